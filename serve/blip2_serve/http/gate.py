"""The door: what is refused before its body is read, and how bodies come in."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterable
from contextvars import ContextVar

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip2_serve.errors import Blip2ServeError, Overloaded, TimedOut
from blip2_serve.http.admission import Admission, Ticket
from blip2_serve.observe import metrics
from blip2_serve.observe.metrics import Recorder

DROP_WITHIN_S = 5.0

_ticket: ContextVar[Ticket | None] = ContextVar("ticket", default=None)


def ticket() -> Ticket | None:
    """The ticket of the request that this code works for; None if it came in without one."""
    return _ticket.get()


class Door:
    """Admits requests that compute, which are those with POST.

    The body of a refused request is read and dropped, within limits: a client that is still sending
    would otherwise see a reset.
    """

    def __init__(
        self,
        admission: Admission,
        recorder: Recorder,
        max_body_bytes: int,
        body_timeout_s: float,
    ) -> None:
        self._admission = admission
        self._recorder = recorder
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s

    async def enter(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the application on a request, or refuses that."""
        if scope["type"] != "http" or scope["method"] != "POST" or ticket():
            await app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        length = int(declared) if declared.isdigit() else self._max_body_bytes
        try:
            entered = self._admission.enter(min(length, self._max_body_bytes))
        except Overloaded as error:
            await self._refuse(error, receive, send)
            return
        with entered:
            token = _ticket.set(entered)
            try:
                await app(scope, self._in_time(receive), send)
            finally:
                _ticket.reset(token)

    async def _refuse(self, error: Overloaded, receive: Receive, send: Send) -> None:
        self._recorder.add(metrics.REQUESTS, route="other", outcome="overloaded")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DROP_WITHIN_S):
                dropped, more = 0, True
                while more and dropped <= self._max_body_bytes:
                    message = await receive()
                    dropped += len(message.get("body", b""))
                    more = message.get("more_body", False)
        await answer(error, send)

    def _in_time(self, receive: Receive) -> Receive:
        """Receives the body within a limit of time, so that slow uploads cannot fill the server."""
        ends = asyncio.get_running_loop().time() + self._body_timeout_s
        complete = False

        async def receive_in_time() -> Message:
            nonlocal complete
            if complete:
                return await receive()  # waits until the client leaves
            try:
                async with asyncio.timeout_at(ends):
                    message = await receive()
            except TimeoutError:
                raise TimedOut("the request's body took too long to arrive") from None
            complete = not message.get("more_body", False)
            return message

        return receive_in_time


class Gate:
    """ASGI middleware: the door of an application, for requests that have not passed it yet."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._door.enter(self._app, scope, receive, send)


async def answer(
    error: Blip2ServeError, send: Send, others: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """Sends an error as the whole response, with other headers besides its own, or instead."""
    body = json.dumps(error.body()).encode()
    headers = {name.lower().encode(): value.encode() for name, value in error.headers().items()}
    headers |= {name.lower(): value for name, value in others}
    headers |= {b"content-type": b"application/json", b"content-length": b"%d" % len(body)}
    start = {"type": "http.response.start", "status": error.status, "headers": [*headers.items()]}
    await send(start)
    await send({"type": "http.response.body", "body": body})
