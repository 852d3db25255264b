"""Runs the application on Ray Serve and talks to it over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from ray import serve
from ray.serve.schema import LoggingConfig

from blip2_serve.app import build
from blip2_serve.config import AppConfig

STARTED_WITHIN_S = 180
TIMEOUT_S = 120
POLL_S = 0.05
NO_AUTHORITY = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # loading the usual ones takes 26 ms

T = TypeVar("T")


@dataclass(frozen=True)
class App:
    """A running application."""

    name: str
    url: str

    async def stats(self, deployment: str) -> dict[str, Any]:
        """Returns what the stage's method `stats` returns."""
        stats: dict[str, Any] = await serve.get_deployment_handle(
            deployment, self.name
        ).stats.remote()
        return stats

    async def until_idle(self) -> dict[str, Any]:
        """Waits until the engine has no sequences, and returns its stats."""
        deadline = time.monotonic() + TIMEOUT_S
        while (stats := await self.stats("Generator"))["running"] or stats["waiting"]:
            assert time.monotonic() < deadline, f"still busy: {stats}"
            await asyncio.sleep(0.01)
        return stats

    def post(self, path: str, **kwargs: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=TIMEOUT_S, **kwargs)

    def client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=400)
        return httpx.AsyncClient(base_url=self.url, timeout=TIMEOUT_S, limits=limits)


def start_app(base_url: str, name: str, config: dict[str, Any]) -> App:
    """Deploys an application at /name on the running Ray Serve, and waits until it is ready."""
    stages = ("ingress", "preprocessor", "encoder", "generator")
    # Nothing is reserved, because several applications share two cores.
    light = {stage: {**config.get(stage, {}), "num_cpus": 0} for stage in stages}
    # However slow the machine, a test that is not about overload is not refused.
    patient = {"max_wait_s": 600, "initial_requests": 1000}
    light["ingress"]["admission"] = {**patient, **light["ingress"].get("admission", {})}
    application = build(AppConfig.model_validate({**config, **light}))
    quiet = LoggingConfig(log_level="WARNING")
    serve.run(application, name=name, route_prefix=f"/{name}", logging_config=quiet)
    app = App(name, f"{base_url}/{name}")
    wait_until(lambda: is_successful(f"{app.url}/ready"))
    return app


def wait_until(condition: Callable[[], bool], within_s: float = STARTED_WITHIN_S) -> None:
    """Polls the condition until it is true; fails the test after `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"the condition was not met within {within_s} s"
        time.sleep(POLL_S)


async def gather_at_most(at_once: int, calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Returns all results in order; runs at most `at_once` calls concurrently."""
    gate = asyncio.Semaphore(at_once)

    async def gated(call: Coroutine[Any, Any, T]) -> T:
        async with gate:
            return await call

    return await asyncio.gather(*map(gated, calls))


def free_port() -> int:
    """A port that nothing uses, and that Linux gives to nobody who asks for any."""
    for port in random.sample(range(61_000, 65_536), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def is_successful(url: str) -> bool:
    """Whether a GET request to the URL succeeds; False while nothing listens."""
    try:
        with httpx.Client(verify=NO_AUTHORITY, trust_env=False, timeout=30) as client:
            return client.get(url).is_success
    except httpx.TransportError:
        return False
