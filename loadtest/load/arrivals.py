"""An open loop: requests come when they come, and wait for nobody.

A user who waits for an answer asks less often when the server is slow, so the requests that would
have suffered are never sent (coordinated omission). Here each one has its time beforehand; it is
started then, and its latency counts from then, also where this process is late itself.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

import gevent
from gevent.pool import Group

MOST_UNDER_WAY = 2_000

Arrival = tuple[float, str]  # seconds since the start, and a kind


def poisson(
    rate_at: Callable[[float], float],
    seconds: float,
    weights: dict[str, float],
    rng: random.Random,
) -> Iterator[Arrival]:
    """Random arrivals of which each is independent of all others, by thinning."""
    most = max(rate_at(seconds * i / 1_000) for i in range(1_001))
    kinds, shares = [*weights], [*weights.values()]
    at = rng.expovariate(most)
    while at < seconds:
        if rng.random() * most < rate_at(at):
            yield at, rng.choices(kinds, shares)[0]
        at += rng.expovariate(most)


class OpenLoop:
    """Starts `call(kind, due)` for each arrival, in a greenlet of its own."""

    def __init__(
        self,
        call: Callable[[str, float], None],
        fail: Callable[[str, float, str], None],
        limit: int = MOST_UNDER_WAY,
    ) -> None:
        """`due` is in seconds since 1970. `fail` is told of what was not sent, or not answered."""
        self._call = call
        self._fail = fail
        self._limit = limit
        self._under_way: dict[gevent.Greenlet, Arrival] = {}
        self._group = Group()
        self.late_s = 0.0  # this process, at most

    def run(self, arrivals: Iterator[Arrival]) -> None:
        """Until the last one is answered."""
        start = time.time()
        for at, kind in arrivals:
            due = start + at
            gevent.sleep(max(0.0, due - time.time()))
            self.late_s = max(self.late_s, time.time() - due)
            if len(self._under_way) >= self._limit:
                self._fail(kind, due, f"not sent: {self._limit} requests were under way")
                continue
            greenlet = self._group.spawn(self._call, kind, due)
            self._under_way[greenlet] = due, kind
            greenlet.link(self._under_way.pop)
        self._group.join()

    def stop(self) -> None:
        """Gives up what is under way."""
        for due, kind in list(self._under_way.values()):
            self._fail(kind, due, "not answered when the run ended")
        self._group.kill(block=False)
