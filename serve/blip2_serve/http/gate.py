"""The door: what is refused before its body is read, and how bodies come in."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar
from functools import partial

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip2_serve.errors import (
    Blip2ServeError,
    Overloaded,
    RateLimited,
    TimedOut,
    Unauthorized,
)
from blip2_serve.http.access import Access, Caller
from blip2_serve.http.admission import Admission, Ticket
from blip2_serve.http.headers import secure
from blip2_serve.observe import metrics
from blip2_serve.observe.metrics import Recorder

DROP_WITHIN_S = 5.0
SLOW_AFTER_S = 0.25  # a body that takes longer counts as work only once it is there

_ticket: ContextVar[Ticket | None] = ContextVar("ticket", default=None)
_caller: ContextVar[Caller | None] = ContextVar("caller", default=None)


def ticket() -> Ticket | None:
    """The ticket of the request that this code works for; None if it came in without one."""
    return _ticket.get()


def caller() -> Caller | None:
    """Whose request this code works for; None: anybody's."""
    return _caller.get()


class Door:
    """Asks who is there, and admits requests that compute, which are those with POST.

    The body of a refused request is read and dropped, within limits: a client that is still sending
    would otherwise see a reset.
    """

    def __init__(
        self,
        access: Access,
        admission: Admission,
        recorder: Recorder,
        max_body_bytes: int,
        body_timeout_s: float,
    ) -> None:
        self._access = access
        self._admission = admission
        self._recorder = recorder
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s
        self._turn = asyncio.Lock()

    async def enter(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the application on a request, or refuses that. One that was admitted just runs."""
        if scope["type"] != "http" or ticket():
            await app(scope, receive, send)
            return
        try:
            caller = self._access.caller(scope)
        except Unauthorized as error:
            await self._refuse(error, receive, send)
            return
        if scope["method"] != "POST":
            await app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        length = int(declared) if declared.isdigit() else 0  # chunks count as they come
        try:
            if caller:
                caller.check()
            tenant = self._access.tenant(scope, caller)
            entered = self._admission.enter(min(length, self._max_body_bytes), tenant)
        except (RateLimited, Overloaded) as error:
            await self._refuse(error, receive, send)
            return
        with entered, caller.running() if caller else contextlib.nullcontext():
            tokens = _ticket.set(entered), _caller.set(caller)
            try:
                await app(scope, receive, send)
            finally:
                _ticket.reset(tokens[0])
                _caller.reset(tokens[1])

    async def limit_body(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the application on a request that was admitted; its body comes within limits."""
        if not (entered := ticket()):
            await app(scope, receive, send)
            return
        ends = asyncio.get_running_loop().time() + self._body_timeout_s
        body = _Body(receive, entered, ends, self._turn, lambda: self._drop(receive))
        with contextlib.closing(body):
            await app(scope, body.receive, send)

    async def _refuse(self, error: Blip2ServeError, receive: Receive, send: Send) -> None:
        outcome = "overloaded" if isinstance(error, Overloaded) else "invalid"
        self._recorder.add(metrics.REQUESTS, route="other", outcome=outcome)
        if error.code and outcome == "invalid":
            self._recorder.add(metrics.REJECTIONS, reason=error.code)
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

    So slow uploads keep out neither each other nor anyone else. Whole bodies go in one by one, each
    in an iteration of the event loop: a crowd that comes at once does not hold up what takes no
    time, such as a refusal.
    """

    def __init__(
        self,
        receive: Receive,
        entered: Ticket,
        ends: float,
        turn: asyncio.Lock,
        drop: Callable[[], Awaitable[None]],
    ) -> None:
        self._receive = receive
        self._ticket = entered
        self._ends = ends
        self._turn = turn
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
            try:
                return await self._receive()  # waits until the client leaves
            except Exception:  # how Ray Serve tells of it now and then
                return {"type": "http.disconnect"}
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
            async with self._turn:
                await asyncio.sleep(0)
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


class Gate:
    """ASGI middleware: the door of an application, and behind it the limits of bodies."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._door = door
        self._inside = partial(door.limit_body, app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._door.enter(self._inside, scope, receive, send)


async def answer(
    error: Blip2ServeError, send: Send, others: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """Sends an error as the whole response, with other headers besides its own, or instead."""
    body = json.dumps(error.body()).encode()
    headers = {name.lower().encode(): value.encode() for name, value in error.headers().items()}
    headers |= {name.lower(): value for name, value in others}
    headers |= {b"content-type": b"application/json", b"content-length": b"%d" % len(body)}
    start = {"type": "http.response.start", "status": error.status, "headers": [*headers.items()]}
    secure(MutableHeaders(scope=start))
    await send(start)
    await send({"type": "http.response.body", "body": body})
