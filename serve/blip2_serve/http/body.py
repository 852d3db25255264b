"""What is done to every request's body before a route reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip2_serve.errors import RequestTooLarge


class RequestBody:
    """ASGI middleware: bodies have a limit, and are JSON unless they say multipart.

    The limit counts the declared length and what really arrives; beyond it, reading the body raises
    `RequestTooLarge`. `curl -d` declares a form where it sends JSON: its declaration is ignored.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if not headers.get("content-type", "").lower().startswith("multipart/"):
            others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
            scope = {**scope, "headers": [*others, (b"content-type", b"application/json")]}
        declared = headers.get("content-length", "")
        too_large = declared.isdigit() and int(declared) > self._max_bytes
        received = 0

        async def limited() -> Message:
            nonlocal received
            message: Message = {} if too_large else await receive()
            received += len(message.get("body", b""))
            if too_large or received > self._max_bytes:
                raise RequestTooLarge(f"the request's body is above {self._max_bytes:,} bytes")
            return message

        await self._app(scope, limited, send)


class QuickJson(APIRoute):
    """A route whose JSON is read by pydantic's parser, not by Python's.

    With a picture of 7 MB in it that takes 1 ms instead of 17, in which nothing else would happen.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_quickly(request: Request) -> Response:
            return await handle(_QuickRequest(request.scope, request.receive))

        return handle_quickly


class _QuickRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        try:
            return from_json(body)
        except ValueError:
            return json.loads(body)  # accepts a little more, and says where it is wrong
