"""The time limit that a client sets for its request, by the header that Ray Serve reads too.

Ray Serve cuts the request at the limit, without a word in a stream. So the application gives up a
little earlier, and says why.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar

from starlette.requests import Request

from blip2_serve.errors import TimedOut

HEADER = "x-request-timeout-seconds"

# How much earlier, but not by more than half of the limit: two hops take 10 to 20 ms on two cores.
EARLIER_S = 0.05

_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


def current() -> float | None:
    """When the current request must have ended, by the event loop's clock; None: whenever."""
    return _deadline.get()


def time_left() -> float | None:
    """Seconds that the current request has left; None: as many as it needs."""
    deadline = _deadline.get()
    return None if deadline is None else deadline - asyncio.get_running_loop().time()


@asynccontextmanager
async def limited(request: Request) -> AsyncIterator[None]:
    """Runs the block within the request's limit, if it has one.

    Raises:
        TimedOut: the limit is over.
    """
    limit = _seconds(request.headers.get(HEADER, ""))
    if limit is None:
        yield
        return
    deadline = asyncio.get_running_loop().time() + max(limit - EARLIER_S, limit / 2)
    token = _deadline.set(deadline)
    try:
        async with until(deadline):
            yield
    finally:
        _deadline.reset(token)


@asynccontextmanager
async def until(deadline: float) -> AsyncIterator[None]:
    """Runs the block until a deadline of `current`.

    Raises:
        TimedOut: it was not done by then.
    """
    try:
        async with asyncio.timeout_at(deadline) as timeout:
            yield
    except TimeoutError:
        if not timeout.expired():  # the block's own
            raise
        raise TimedOut(f"the answer took longer than the header {HEADER} allows") from None


def _seconds(value: str) -> float | None:
    """The limit; as for Ray Serve, there is none if the value is not a number above 0."""
    try:
        seconds = float(value)
    except ValueError:
        return None
    return seconds if 0 < seconds < math.inf else None
