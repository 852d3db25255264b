"""How the bodies of all requests are received."""

from __future__ import annotations

import codecs
import contextlib
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip2_serve.errors import RequestTooLarge
from blip2_serve.http import deadline

MAX_JSON_VALUES = 250_000


class RequestBody:
    """ASGI middleware: limits bodies to `max_bytes`, and takes all but multipart ones for JSON.

    The limit applies to the declared length and to what really arrives. Reading a body beyond it
    raises `RequestTooLarge`. Content types are ignored because `curl -d` declares JSON as a form.
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
                raise RequestTooLarge(f"the request body exceeds {self._max_bytes:,} bytes")
            return message

        await self._app(scope, limited, send)


class HeadAsGet:
    """ASGI middleware: answers HEAD as GET is answered, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            is_body = message["type"] == "http.response.body"
            await send({**message, "body": b""} if is_body else message)

        await self._app({**scope, "method": "GET"}, receive, send_head)


def as_utf8(body: bytes) -> bytes:
    """A JSON body in UTF-8 without a byte order mark; as it is if it cannot be decoded.

    Windows' tools put a mark before JSON, and some of them write UTF-16.

    Raises:
        RequestTooLarge: it has so many values that checking them would take seconds.
    """
    if len(body) > MAX_JSON_VALUES and sum(map(body.count, b",[{")) > MAX_JSON_VALUES:
        raise RequestTooLarge(f"the request body has more than {MAX_JSON_VALUES:,} values")
    if body.startswith(codecs.BOM_UTF8):
        return body[len(codecs.BOM_UTF8) :]
    if body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        with contextlib.suppress(UnicodeError):
            return body.decode(json.detect_encoding(body)).encode()
    return body


class QuickJson(APIRoute):
    """A route that reads JSON with pydantic's parser instead of Python's, and keeps deadlines.

    A body with a 7 MB image takes it 1 ms instead of 17, and the event loop waits meanwhile.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_quickly(request: Request) -> Response:
            async with deadline.limited(request, request.app.state.request_timeout_s):
                return await handle(_QuickRequest(request.scope, request.receive))

        return handle_quickly


class _QuickRequest(Request):
    async def json(self) -> Any:
        body = as_utf8(await self.body())
        try:
            return from_json(body)
        except ValueError:
            return json.loads(body)  # a little more lenient, and locates errors
