"""What is measured of every HTTP exchange: how often, how it ended, how long it took."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip2_serve.errors import Blip2ServeError, InvalidImage, Overloaded, Unavailable
from blip2_serve.observe import metrics
from blip2_serve.observe.metrics import Recorder
from blip2_serve.types import TokenEvent

# Errors of requests whose form was right.
_REJECTIONS = ("context_length_exceeded", "overloaded", "request_too_large", "unavailable")


@dataclass
class Exchange:
    """A request that is being answered."""

    scope: Scope
    arrived: float  # as time.perf_counter() counts
    error: Blip2ServeError | None = None  # what the client is told

    @property
    def route(self) -> str:
        """The template of its path."""
        return getattr(self.scope.get("route"), "path", "other")


_current: ContextVar[Exchange] = ContextVar("exchange")


class Measure:
    """ASGI middleware; the innermost, so that it sees what the router makes of the scope."""

    def __init__(self, app: ASGIApp, recorder: Recorder) -> None:
        self._app = app
        self._recorder = recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(scope, time.perf_counter())
        _current.set(exchange)
        outcome = "cancelled"
        has_left = False

        async def heard() -> Message:
            nonlocal has_left
            try:
                return await receive()
            except Blip2ServeError:  # too large a body
                raise
            except Exception:  # whatever the server raises when the connection is gone
                has_left = True
                raise

        async def watched(message: Message) -> None:
            nonlocal outcome
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                outcome = _outcome(exchange.error)

        try:
            await self._app(scope, heard, watched)
        except Exception as error:
            outcome = "cancelled" if has_left else _outcome(Blip2ServeError(str(error)))
            raise
        finally:
            route = exchange.route
            self._recorder.add(metrics.REQUESTS, route=route, outcome=outcome)
            seconds = time.perf_counter() - exchange.arrived
            self._recorder.observe(metrics.REQUEST_DURATION, seconds, route=route)


def note_error(recorder: Recorder, error: Blip2ServeError, *, answers: bool = True) -> None:
    """Counts an error by its kind; `answers` if it is the answer to the whole request."""
    if answers and (exchange := _current.get(None)):
        exchange.error = error
    if isinstance(error, InvalidImage):
        recorder.add(metrics.IMAGE_ERRORS, kind=error.kind)
    elif error.code in _REJECTIONS:
        recorder.add(metrics.REJECTIONS, reason=error.code)


async def timed(
    events: AsyncGenerator[TokenEvent, None], recorder: Recorder
) -> AsyncGenerator[TokenEvent, None]:
    """The same events, measured: the first token, and the time between the tokens of an answer."""
    exchange = _current.get()
    before: dict[int, float] = {}  # by answer
    try:
        async for event in events:
            now = time.perf_counter()
            if not before:
                seconds = now - exchange.arrived
                recorder.observe(metrics.TIME_TO_FIRST_TOKEN, seconds, route=exchange.route)
            elif event.index in before and event.token_ids:
                seconds = (now - before[event.index]) / len(event.token_ids)
                recorder.observe(metrics.INTER_TOKEN_LATENCY, seconds, route=exchange.route)
            before[event.index] = now
            yield event
    finally:
        await events.aclose()


def _outcome(error: Blip2ServeError | None) -> str:
    if error is None:
        return "ok"
    if isinstance(error, Overloaded):
        return "overloaded"
    if isinstance(error, Unavailable):
        return "unavailable"
    return "error" if error.status >= 500 else "invalid"
