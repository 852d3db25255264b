"""Measures every HTTP exchange: how many, how they end, how long they take."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip2_serve.errors import Blip2ServeError, InvalidImage, Overloaded, TimedOut, Unavailable
from blip2_serve.observe import metrics
from blip2_serve.observe.metrics import Recorder
from blip2_serve.types import TokenEvent

# Codes of errors by which a well-formed request is refused or given up.
_REJECTIONS = (
    "context_length_exceeded",
    "overloaded",
    "quarantined",
    "request_too_large",
    "timeout",
    "unavailable",
)


@dataclass
class Exchange:
    """A request while it is being answered."""

    scope: Scope
    arrived: float  # by time.perf_counter()
    error: Blip2ServeError | None = None  # set if the answer is an error
    admitted: float = 0.0  # by time.perf_counter(), as the next
    encoded: float = 0.0  # when the features of its image were there
    encode_s: float = 0.0  # that the encoder took for them, maybe for an earlier request

    @property
    def route(self) -> str:
        """The template of the path, so that labels stay few: /v1/models/{name:path}."""
        return getattr(self.scope.get("route"), "path", "other")


_current: ContextVar[Exchange] = ContextVar("exchange")


class Measure:
    """ASGI middleware that counts and times requests.

    It is the innermost one: only there does the scope hold the route that the router has chosen.
    """

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
                message = await receive()
            except Blip2ServeError:  # the body is too large
                raise
            except Exception:  # of the server's own kind, when the connection is gone
                has_left = True
                raise
            has_left = message["type"] == "http.disconnect"
            return message

        async def watched(message: Message) -> None:
            nonlocal outcome
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                outcome = "cancelled" if has_left else _outcome(exchange.error)

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
    """Counts an error by its kind.

    `answers`: it is the answer to the whole request, not to one of its images.
    """
    if answers and (exchange := _current.get(None)):
        exchange.error = error
    if isinstance(error, InvalidImage):
        recorder.add(metrics.IMAGE_ERRORS, kind=error.kind)
    elif error.code in _REJECTIONS:
        recorder.add(metrics.REJECTIONS, reason=error.code)


def note_admitted() -> None:
    """The request goes to the stages now."""
    if exchange := _current.get(None):
        exchange.admitted = time.perf_counter()


def note_encoded(encode_s: float) -> None:
    """The features of its image are there; the encoder took so many seconds for them."""
    if exchange := _current.get(None):
        exchange.encoded, exchange.encode_s = time.perf_counter(), encode_s


class StreamTimer:
    """Measures one streamed answer: time to first token, and latency between later tokens."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._exchange = _current.get()
        self._previous: dict[int, float] = {}  # by choice: when its last event came
        self._first = self._last = 0.0
        self._queue_s = 0.0

    def received(self, event: TokenEvent) -> None:
        """Call this as soon as the event is there."""
        self._queue_s = self._queue_s or event.queue_s
        if not (event.token_ids or event.finish_reason):  # it only tells of beams
            return
        now = time.perf_counter()
        route = self._exchange.route
        if not self._previous:
            seconds = now - self._exchange.arrived
            self._recorder.observe(metrics.TIME_TO_FIRST_TOKEN, seconds, route=route)
            self._first = now
        elif event.index in self._previous and event.token_ids:
            seconds = (now - self._previous[event.index]) / len(event.token_ids)
            self._recorder.observe(metrics.INTER_TOKEN_LATENCY, seconds, route=route)
        self._previous[event.index] = self._last = now

    def timing(self) -> dict[str, float]:
        """Where the time has gone, in seconds, from the request's arrival to its last token.

        Features that were kept, or on their way for another request, cost the rest of their time.
        """
        exchange = self._exchange
        image_s, first_s = exchange.encoded - exchange.admitted, self._first - exchange.encoded
        encode_s, queue_s = min(image_s, exchange.encode_s), min(first_s, self._queue_s)
        spans = {
            "admission_s": exchange.admitted - exchange.arrived,
            "image_decode_s": image_s - encode_s,
            "image_encode_s": encode_s,
            "queue_s": queue_s,
            "first_token_s": first_s - queue_s,
            "tokens_s": self._last - self._first,
        }
        return {name: round(seconds, 6) for name, seconds in spans.items()}


def _outcome(error: Blip2ServeError | None) -> str:
    if error is None:
        return "ok"
    if isinstance(error, Overloaded):
        return "overloaded"
    if isinstance(error, Unavailable):
        return "unavailable"
    if isinstance(error, TimedOut):
        return "cancelled"
    return "error" if error.status >= 500 else "invalid"
