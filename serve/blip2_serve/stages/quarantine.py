"""Keeps content that kills replicas from killing one after the other. Needs no Ray.

A call that was under way at two deaths is suspect. Suspects run alone, one by one and the smallest
first, on a replica that takes nothing else meanwhile. If that replica dies too, the suspect was the
cause, and its content is refused for a while.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable

from blip2_serve.errors import Quarantined

QUARANTINE_S = 300.0


class Quarantine:
    """One stage's suspects, and the content that is refused. `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._refused: dict[str, float] = {}  # until when, by key
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []  # a heap
        self._order = itertools.count()
        self._busy = False
        self._replica: str | None = None  # where a suspect runs

    def check(self, key: str) -> None:
        """Refuses content in quarantine.

        Raises:
            Quarantined: it is.
        """
        if self._refused.get(key, 0.0) > self._clock():
            raise Quarantined(
                "this request has been refused for some minutes: replicas died while they worked "
                "on it"
            )

    def put(self, key: str) -> Quarantined:
        """Refuses this content from now on; returns the error to raise."""
        now = self._clock()
        self._refused = {k: until for k, until in self._refused.items() if until > now}
        self._refused[key] = now + QUARANTINE_S
        return Quarantined("replicas died while they worked on this request")

    async def turn(self, size: float) -> None:
        """Waits for a suspect's turn; `done` must be called after it."""
        if self._busy:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (size, next(self._order), turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():  # it was its turn already
                    self.done()
                raise
        self._busy = True

    def done(self) -> None:
        """Ends a suspect's turn."""
        self._busy, self._replica = False, None
        while self._waiting:
            turn = heapq.heappop(self._waiting)[2]
            if not turn.done():
                self._busy = True
                turn.set_result(None)
                return

    def allowed(self, replicas: list[str], *, alone: bool) -> list[str]:
        """Which of the replicas a suspect (`alone`), or any other call, may use."""
        if not alone:
            return [replica for replica in replicas if replica != self._replica]
        if self._replica not in replicas:
            self._replica = min(replicas, default=None)
        return [self._replica] if self._replica else []
