"""The door: what is refused before its body is read, and how bodies come in."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from contextvars import ContextVar

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip2_serve.errors import Blip2ServeError, Overloaded, TimedOut
from blip2_serve.http.admission import Admission, Ticket
from blip2_serve.observe import metrics
from blip2_serve.observe.metrics import Recorder

DROP_WITHIN_S = 5.0
SLOW_AFTER_S = 0.25  # a body that takes longer counts as work only once it is there

_ticket: ContextVar[Ticket | None] = ContextVar("ticket", default=None)


def ticket() -> Ticket | None:
    """The ticket of the request that this code works for; None if it came in without one."""
    return _ticket.get()


class Gate:
    """ASGI middleware: admits requests that compute, which are those with POST.

    The outermost one, since refusing must be cheap. The body of a refused request is read and
    dropped, within limits: a client that is still sending would otherwise see a reset.
    """

    def __init__(
        self,
        app: ASGIApp,
        admission: Admission,
        recorder: Recorder,
        max_body_bytes: int,
        body_timeout_s: float,
    ) -> None:
        self._app = app
        self._admission = admission
        self._recorder = recorder
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        length = int(declared) if declared.isdigit() else 0  # chunks count as they come
        try:
            entered = self._admission.enter(min(length, self._max_body_bytes))
        except Overloaded as error:
            await self._refuse(error, receive, send)
            return
        with entered, contextlib.closing(self._body(receive, entered)) as body:
            _ticket.set(entered)
            await self._app(scope, body.receive, send)

    def _body(self, receive: Receive, entered: Ticket) -> _Body:
        ends = asyncio.get_running_loop().time() + self._body_timeout_s
        return _Body(receive, entered, ends, lambda: self._drop(receive))

    async def _refuse(self, error: Overloaded, receive: Receive, send: Send) -> None:
        self._recorder.add(metrics.REQUESTS, route="other", outcome="overloaded")
        await self._drop(receive)
        await answer(error, send)

    async def _drop(self, receive: Receive) -> None:
        """Reads what is left of a body, within limits."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DROP_WITHIN_S):
                dropped, more = 0, True
                while more and dropped <= self._max_body_bytes:
                    message = await receive()
                    dropped += len(message.get("body", b""))
                    more = message.get("more_body", False)


class _Body:
    """A body on its way, within limits of time, bytes and the number of slow ones.

    So slow uploads keep out neither each other nor anyone else.
    """

    def __init__(
        self,
        receive: Receive,
        entered: Ticket,
        ends: float,
        drop: Callable[[], Awaitable[None]],
    ) -> None:
        self._receive = receive
        self._ticket = entered
        self._ends = ends
        self._drop = drop
        self._loop = asyncio.get_running_loop()
        self._complete = False
        self._refusal: Overloaded | None = None
        self._scope: asyncio.Timeout | None = None  # of the message that is awaited
        self._timer = self._loop.call_later(SLOW_AFTER_S, self._is_slow)

    async def receive(self) -> Message:
        """The next message of the connection, as the application receives it.

        Raises:
            Overloaded, TimedOut: the body goes beyond a limit.
        """
        if self._complete:
            return await self._receive()  # waits until the client leaves
        try:
            async with asyncio.timeout_at(self._ends) as self._scope:
                message = await self._receive()
        except TimeoutError:
            self.close()
            if self._refusal:
                raise self._refusal from None
            raise TimedOut("the request's body took too long to arrive") from None
        finally:
            self._scope = None
        self._complete = not message.get("more_body", False)
        if self._complete:
            self.close()
        try:
            self._ticket.received(len(message.get("body", b"")))
        except Overloaded:
            if not self._complete:
                await self._drop()
            raise
        if self._complete:
            self._ticket.complete()
        return message

    def close(self) -> None:
        self._timer.cancel()

    def _is_slow(self) -> None:
        try:
            self._ticket.slow()
        except Overloaded as error:
            self._refusal, self._ends = error, self._loop.time()
            if self._scope:
                self._scope.reschedule(self._ends)


async def answer(error: Blip2ServeError, send: Send) -> None:
    """Sends an error as the whole response."""
    body = json.dumps(error.body()).encode()
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **error.headers(),
    }
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
