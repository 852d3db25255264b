"""Middleware for Ray Serve's proxy: its own errors in OpenAI's shape.

A request that runs out of time, or that no replica takes, never gets an answer of the application:
the proxy answers in plain text, or leaves a stream without an end. Ray Serve calls `middlewares`
where its proxy starts (behind HAProxy, in the ingress replica) if
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it.
"""

from __future__ import annotations

import asyncio
import json
import os

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip2_serve.environment import CLOSED_FILE
from blip2_serve.errors import Blip2ServeError, Overloaded, TimedOut, Unavailable

_ERRORS: dict[int, Blip2ServeError] = {
    408: TimedOut("the answer took longer than the request or this server allows"),
    429: Overloaded("too many requests are queued; try again later"),
    503: Unavailable("no replica can take the request now; try again later"),
}
_OPEN = ("/health", "/metrics")
_STOPPING = Unavailable("this server is stopping; try again later")
_LOST = Unavailable("a replica was lost while it worked on this; try again")
_CUT = Unavailable("the answer was cut off: it took too long, or a replica was lost; try again")


def middlewares() -> list[Middleware]:
    return [Middleware(OpenAIErrors)]


class OpenAIErrors:
    """Replaces errors in plain text, which the application never sends, and ends cut streams.

    A server that `up` is stopping is closed to new requests, but for those about itself.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._closed_file = os.environ.get(CLOSED_FILE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # Ray Serve's own routes
            await self._app(scope, receive, send)
            return
        # Asked for each request: some microseconds.
        if self._closed_file and scope["path"] not in _OPEN and os.path.exists(self._closed_file):
            await _answer(send, _STOPPING.status, _STOPPING, Headers({"retry-after": "1"}))
            return
        media_type = ""  # of an answer that has begun
        replaced = ended = False

        async def watched(message: Message) -> None:
            nonlocal media_type, replaced, ended
            if message["type"] == "http.response.start":
                headers = Headers(raw=message.get("headers", []))
                media_type = headers.get("content-type", "none")
                error = _ERRORS.get(int(message["status"]))
                if error and media_type.startswith("text/plain"):
                    replaced = ended = True
                    await _answer(send, int(message["status"]), error, headers)
            elif message["type"] == "http.response.body":
                ended = ended or not message.get("more_body", False)
            if not replaced:
                await send(message)

        async def finish() -> None:
            if not media_type:
                await _answer(send, _LOST.status, _LOST, Headers())
            elif not ended and media_type.startswith("text/event-stream"):
                event = b"data: " + json.dumps(_CUT.body()).encode() + b"\n\n"
                await send({"type": "http.response.body", "body": event})

        try:
            await self._app(scope, receive, watched)
        except asyncio.CancelledError:  # how Ray Serve ends a request behind HAProxy
            if media_type:
                await finish()
            raise
        await finish()


async def _answer(send: Send, status: int, error: Blip2ServeError, headers: Headers) -> None:
    body = json.dumps(error.body()).encode()
    kept = [(k, v) for k, v in headers.raw if k.lower() not in (b"content-type", b"content-length")]
    own = {"content-type": "application/json", "content-length": str(len(body)), **error.headers()}
    more = [(n.lower().encode(), v.encode()) for n, v in own.items() if n not in Headers(raw=kept)]
    await send({"type": "http.response.start", "status": status, "headers": [*kept, *more]})
    await send({"type": "http.response.body", "body": body})
