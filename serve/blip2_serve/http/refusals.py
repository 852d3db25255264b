"""Refusals of a busy server: counted, logged, and with a time at which to come back. No Ray."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from blip2_serve.errors import Overloaded
from blip2_serve.observe import metrics
from blip2_serve.observe.metrics import Recorder

logger = logging.getLogger(__name__)

RATE_OVER_S = 5.0  # seconds that the rate of finished requests is taken over
RETURN_SHARE = 0.09  # of what the server can do: what refused clients may ask for when they return
LONGEST_RETRY_S = 60
WARN_EVERY_S = 1.0


@dataclass(frozen=True)
class Capacity:
    """What the stages can do for this ingress replica; None while no replica has told."""

    images_per_s: float | None = None  # decoded and encoded
    answers_per_s: float | None = None  # average ones
    is_mending: bool = False  # a replica has just been lost, and another one starts


class Refusals:
    """Those of one ingress replica. For the arguments, see `Admission`."""

    def __init__(
        self,
        capacity: Callable[[], Capacity],
        recorder: Recorder,
        refused: Callable[[], None],
        clock: Callable[[], float],
        draw: Callable[[], float],
    ) -> None:
        self._capacity = capacity
        self._recorder = recorder
        self._note_refused = refused
        self._clock = clock
        self._draw = draw
        self._finished: deque[float] = deque()  # when
        self._next_return = -math.inf  # when the next refused client should come back
        self._warned = -math.inf
        self._unsaid = 0  # refusals since the last warning

    def finished(self) -> None:
        """A request is answered."""
        self._finished.append(self._clock())

    def refusal(self, reason: str, excess_s: float) -> Overloaded:
        """The error for a request that comes so many seconds too early."""
        self._recorder.add(metrics.SHED, reason=reason)
        self._note_refused()
        retry_s = self._retry_after_s(excess_s)
        self._warn()
        return Overloaded("the server is busy; try again later", retry_after_s=retry_s)

    def _retry_after_s(self, excess_s: float) -> float:
        """When a client that is refused now should come back so as to be admitted then.

        Nobody can tell a client that comes back from a new one. So they are asked back one by one,
        at a rate that is a small share of what the server can do.
        """
        now = self._clock()
        back = max(self._next_return, now + max(excess_s, 1.0))
        if back > now + LONGEST_RETRY_S:
            return float(math.ceil(LONGEST_RETRY_S * (1 + self._draw()) / 2))
        self._next_return = back + 1 / (RETURN_SHARE * self._rate(now))
        return float(math.ceil(back - now))

    def _rate(self, now: float) -> float:
        """Requests per second that are finished, or could be while none is."""
        while self._finished and self._finished[0] <= now - RATE_OVER_S:
            self._finished.popleft()
        if self._finished:
            return len(self._finished) / RATE_OVER_S
        capacity = self._capacity()
        return min(capacity.images_per_s or 1.0, capacity.answers_per_s or 1.0)

    def _warn(self) -> None:
        """Logs at most one line per second, however many are refused."""
        self._unsaid += 1
        now = self._clock()
        if now - self._warned >= WARN_EVERY_S:
            logger.warning("busy: %d requests refused", self._unsaid)
            self._warned, self._unsaid = now, 0
