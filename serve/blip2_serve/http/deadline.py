"""The time limit of a request: the server's, or less if a header that Ray Serve reads too says so.

Ray Serve cuts the request at its limit, without a word in a stream. So the application gives up a
little earlier, and says why.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import Request

from blip2_serve.errors import TimedOut

HEADER = "x-request-timeout-seconds"

# How much earlier, but not by more than half of the limit. Two hops take 10 to 20 ms on two cores;
# a long limit may have a longer pause of the event loop in it.
EARLIER_S, EARLIER_SHARE = 0.05, 0.01

T = TypeVar("T")


@dataclass(frozen=True)
class Deadline:
    """When a request must have ended, by the event loop's clock, and what says so."""

    at: float
    limit: str

    def error(self) -> TimedOut:
        return TimedOut(f"the answer took longer than {self.limit}")


_deadline: ContextVar[Deadline | None] = ContextVar("deadline", default=None)


def current() -> float | None:
    """When the current request must have ended, by the event loop's clock; None: whenever."""
    deadline = _deadline.get()
    return None if deadline is None else deadline.at


def time_left() -> float | None:
    """Seconds that the current request has left; None: as many as it needs."""
    deadline = _deadline.get()
    return None if deadline is None else deadline.at - asyncio.get_running_loop().time()


@asynccontextmanager
async def limited(request: Request, most_s: float) -> AsyncIterator[None]:
    """Runs the block within the limit of the request, and within `most_s` seconds.

    Raises:
        TimedOut: the limit is over.
    """
    asked_s = _seconds(request.headers.get(HEADER, ""))
    limit_s = min(asked_s, most_s)
    limit = f"the header {HEADER} allows" if asked_s <= most_s else "this server allows"
    earlier_s = min(EARLIER_S + EARLIER_SHARE * limit_s, limit_s / 2)
    deadline = Deadline(asyncio.get_running_loop().time() + limit_s - earlier_s, limit)
    token = _deadline.set(deadline)
    try:
        async with asyncio.timeout_at(deadline.at) as timeout:
            yield
    except TimeoutError:
        if not timeout.expired():  # the block's own
            raise
        raise deadline.error() from None
    finally:
        _deadline.reset(token)


class Alarm:
    """The current request's deadline, for what is awaited after the route has returned.

    One timer serves all that is awaited: a stream has hundreds of events.
    """

    def __init__(self) -> None:
        self._deadline = _deadline.get()
        self._rung = False
        self._waiting: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None
        if self._deadline is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(self._deadline.at, self._ring)

    async def wait(self, awaited: Awaitable[T]) -> T:
        """Awaits it, one at a time.

        Raises:
            TimedOut: the deadline came first.
        """
        if self._rung:
            raise self._error()
        task = asyncio.current_task()
        assert task is not None
        cancelling = task.cancelling()
        self._waiting = task
        try:
            return await awaited
        except asyncio.CancelledError:
            if self._rung and task.uncancel() <= cancelling:
                raise self._error() from None
            raise
        finally:
            self._waiting = None

    def stop(self) -> None:
        """Forgets the deadline."""
        if self._timer is not None:
            self._timer.cancel()

    def _error(self) -> TimedOut:
        assert self._deadline is not None
        return self._deadline.error()

    def _ring(self) -> None:
        self._rung = True
        if self._waiting is not None:
            self._waiting.cancel()


def _seconds(value: str) -> float:
    """The limit; as for Ray Serve, there is none if the value is not a number above 0."""
    try:
        seconds = float(value)
    except ValueError:
        return math.inf
    return seconds if seconds > 0 else math.inf
