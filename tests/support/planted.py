"""An application whose stages stop on demand and die of planted requests.

Files in the checkpoint's parent folder say where to stop, and tell what has happened: every replica
knows that path from its configuration. Production code has no such hooks.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from blip2_serve import app
from blip2_serve.stages import encoder, generator, preprocessor
from support.checkpoints import Recipe, write_checkpoint
from support.server import App, start_app

KILLER = "kill the engine"  # a prompt that does so
DECODER = "support.odd_decoder"


def hold(folder: Path, place: str) -> None:
    """Stops here while a test has this place in `held`."""
    while (folder / f"hold {place}").exists():
        (folder / f"holds {place}").touch()
        time.sleep(0.002)


class Preprocessor(preprocessor.Preprocessor):
    """Its decoders do what the file tells them, as `odd_decoder` has it."""

    async def __init__(self, config: Any) -> None:  # type: ignore[misc]
        pool = partial(preprocessor.DecodePool, module=DECODER)
        with mock.patch.object(preprocessor, "DecodePool", pool):
            await super().__init__(config)


class Encoder(encoder.Encoder):
    """Stops before a batch, at "encode"."""

    async def __init__(self, config: Any, device: str) -> None:  # type: ignore[misc]
        self._folder = Path(config.model).parent
        self._calls = 0
        self._busy = False
        await super().__init__(config, device)

    async def encode(self, *args: Any, call: Any = None) -> Any:
        self._calls += 1
        try:
            return await super().encode(*args, call=call)
        finally:
            self._calls -= 1

    async def stats(self) -> dict[str, Any]:
        """Also how many calls somebody waits for, and whether a batch is computed."""
        return {**await super().stats(), "calls": self._calls, "busy": self._busy}

    def _encode(self, pixels: Any) -> Any:
        self._busy = True
        hold(self._folder, "encode")
        try:
            return super()._encode(pixels)
        finally:
            self._busy = False


class Generator(generator.Generator):
    """Stops after a step, at "prefill" or "decode"; KILLER in a prompt kills its process."""

    async def __init__(self, config: Any, device: str) -> None:  # type: ignore[misc]
        self._folder = Path(config.model).parent
        await super().__init__(config, device)
        self._engine: Any = self._loop._engine
        step = self._engine.step

        def held_step() -> Any:
            result = step()
            if result.report:
                hold(self._folder, result.report.phase)
            return result

        self._engine.step = held_step

    async def generate(self, features: Any, prompt: str, *args: Any, call: Any = None) -> Any:
        self._die_of(prompt)
        return await super().generate(features, prompt, *args, call=call)

    async def stream(
        self, features: Any, prompt: str, *args: Any, call: Any = None
    ) -> AsyncIterator[Any]:
        self._die_of(prompt)
        async for event in super().stream(features, prompt, *args, call=call):
            yield event

    async def stats(self) -> dict[str, Any]:
        """Also how many requests somebody waits for, and what is wrong with the engine's state."""
        return {
            **await super().stats(),
            "readers": len(self._loop._readers),
            "wrong": await self._wrong(),
        }

    async def _wrong(self) -> str | None:
        """Checks the integrity between two steps; while one is held, later."""
        if any(self._folder.glob("hold *")):
            return None
        loop = asyncio.get_running_loop()
        wrong: asyncio.Future[str | None] = loop.create_future()

        def check() -> None:
            try:
                self._engine.check_integrity()
            except AssertionError as error:
                loop.call_soon_threadsafe(wrong.set_result, repr(error))
            else:
                loop.call_soon_threadsafe(wrong.set_result, None)

        self._loop._post(check)
        return await wrong

    def _die_of(self, prompt: str) -> None:
        if KILLER in prompt:
            with (self._folder / "deaths").open("a") as file:
                file.write(f"{os.getpid()}\n")
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Planted(App):
    """The running application. `folder` has the files."""

    folder: Path

    @contextmanager
    def held(self, place: str) -> Iterator[Path]:
        """Stops the stages at a place during the block; yields a file that exists once one has."""
        file, reached = self.folder / f"hold {place}", self.folder / f"holds {place}"
        reached.unlink(missing_ok=True)  # of a stage that looked before the last block's end
        file.touch()
        try:
            yield reached
        finally:
            file.unlink()
            reached.unlink(missing_ok=True)

    @property
    def deaths(self) -> int:
        """How many replicas planted requests have killed."""
        file = self.folder / "deaths"
        return len(file.read_text().splitlines()) if file.exists() else 0


def start_planted(base_url: str, name: str, folder: Path, config: dict[str, Any]) -> Planted:
    """Deploys the application with a random checkpoint in this folder."""
    checkpoint = write_checkpoint(folder / "checkpoint", Recipe(name, seed=2))
    stages = {"Preprocessor": Preprocessor, "Encoder": Encoder, "Generator": Generator}
    with mock.patch.multiple(app, **stages):
        running = start_app(
            base_url, name, {"model": str(checkpoint), "dtype": "float32", **config}
        )
    return Planted(running.name, running.url, folder)
