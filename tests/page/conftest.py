"""The page in a real browser, over real HTTP, before a backend that tests can steer."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvicorn
from playwright.sync_api import Browser, Page

from blip2_serve.config import AppConfig
from blip2_serve.http.api import create_app
from blip2_serve.types import (
    Beam,
    Completion,
    ImageFeatures,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
)
from blip2_serve.types import Choice as Answer
from support.browser import WITHIN_MS, running_browser
from support.fake_backend import FakeBackend
from support.recorder import FakeRecorder

# Chromium drops what is typed before it has drawn the page.
PAINTED = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"

SAID = (" a", " red", " square")


@dataclass
class Scripted(FakeBackend):
    """Says the same of every picture: "a red square", and then how many questions came before.

    While `gate` is clear, streams wait before their last token; while `eyes` is, images do.
    """

    gate: threading.Event = field(default_factory=threading.Event)
    eyes: threading.Event = field(default_factory=threading.Event)
    pictures: list[bytes] = field(default_factory=list)

    async def features(self, image: bytes, owner: str) -> ImageFeatures:
        self.pictures.append(image)
        while not self.eyes.is_set():
            await asyncio.sleep(0.01)
        await super().features(image, owner)
        return ImageFeatures("00", b"", (0, 8), "float32", encode_s=0.001)

    async def generate(self, _: ImageFeatures, prompt: str, params: SamplingParams) -> Completion:
        self._record(prompt, params)
        return Completion((Answer((1, 2, 3), "".join(SAID), "stop"),), 9)

    async def stream(
        self, _: ImageFeatures, prompt: str, params: SamplingParams
    ) -> AsyncGenerator[TokenEvent, None]:
        self.stream_closed.clear()
        try:
            self._record(prompt, params)
            tokens = [*SAID, f" {prompt.count('Question:')}"]
            for i, text in enumerate(tokens):
                last = i == len(tokens) - 1
                while last and not self.gate.is_set():
                    await asyncio.sleep(0.01)
                if i == self.stream_fails_after:
                    raise self.stream_failure
                if params.show_beams:
                    beams = (Beam("".join(tokens[: i + 1]), -0.5, last), Beam(" a cow", -1.5, True))
                    yield TokenEvent((), "", None, 9, beams=beams)
                logprobs = _logprobs(text, params)
                resumed = i == self.loses_replica_after
                reason = "stop" if last else None
                yield TokenEvent(
                    (i,), text, reason, 9, 0, logprobs, last, queue_s=0.001, resumed=resumed
                )
        finally:
            self.stream_closed.set()


def _logprobs(text: str, params: SamplingParams) -> tuple[TokenLogprob, ...]:
    if params.top_logprobs is None:
        return ()
    others = [(text, -0.5), (" a cat", -1.5), (" no", -3.0)]
    top = tuple(TokenLogprob(9, at, word.encode()) for word, at in others[: params.top_logprobs])
    return (TokenLogprob(9, -0.5, text.encode(), top),)


@dataclass(frozen=True)
class Site:
    url: str
    backend: Scripted


@pytest.fixture
def config() -> AppConfig:
    return AppConfig()


@pytest.fixture
def site(config: AppConfig) -> Iterator[Site]:
    """The application on a port of its own; nothing waits."""
    backend = Scripted()
    backend.gate.set()
    backend.eyes.set()
    app = create_app(backend, config, FakeRecorder())
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Site(f"http://127.0.0.1:{listener.getsockname()[1]}/", backend)
        finally:
            backend.gate.set()
            backend.eyes.set()
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture
def allowed() -> list[str]:
    """Parts of console messages that a test expects, such as of a request that is refused."""
    return []


@pytest.fixture
def page(browser: Browser, site: Site, allowed: list[str], tmp_path: Path) -> Iterator[Page]:
    """The page, opened. Fails the test if the console says anything that is not `allowed`."""
    context = browser.new_context(viewport={"width": 1000, "height": 800}, accept_downloads=True)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    context.set_default_timeout(WITHIN_MS)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(site.url)
    page.get_by_text("How to answer: Greedy").wait_for()
    page.evaluate(PAINTED)
    yield page
    page.screenshot(path=tmp_path / "page.png")
    context.close()
    assert [text for text in said if not any(part in text for part in allowed)] == []
