"""A local server with a chat completions route that a test defines."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from loadtest.bench.servers import Endpoint

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[Endpoint]:
    """Serves `handler` as /v1/chat/completions; yields the endpoint."""
    app = web.Application()
    app.router.add_post("/v1/chat/completions", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0]
    try:
        yield Endpoint(f"http://{host}:{port}/v1", "m")
    finally:
        await runner.cleanup()


def whole(tokens: int, text: str = "a dog") -> dict[str, Any]:
    return {
        "choices": [{"message": {"content": text}}],
        "usage": {"completion_tokens": tokens},
    }


def chunk(text: str | None) -> bytes:
    data = {"choices": [{"delta": {"content": text}}], "usage": None}
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def usage(tokens: int) -> bytes:
    data = {"choices": [], "usage": {"completion_tokens": tokens}}
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def streaming(*parts: bytes) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for part in parts:
            await response.write(part)
        return response

    return handler
