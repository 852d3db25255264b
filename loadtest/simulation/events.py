"""The simulated clock: a heap of future calls."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import Any


class Events:
    """Makes calls in order of time; calls of equal times in the order they were planned."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[..., None], Any]] = []
        self._order = count()

    def after(self, seconds: float, call: Callable[[Any], None], argument: Any) -> None:
        heappush(self._heap, (self.now + seconds, next(self._order), call, argument))

    def every(self, seconds: float, call: Callable[[], None]) -> None:
        """Calls now, and for ever at this interval."""

        def again(_: None) -> None:
            call()
            self.after(seconds, again, None)

        again(None)

    def run(self, until: float) -> None:
        heap = self._heap
        while heap and heap[0][0] <= until:
            self.now, _, call, argument = heappop(heap)
            call(argument)
        self.now = until
