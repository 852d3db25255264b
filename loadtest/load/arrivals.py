"""Open-loop arrivals: each request starts at its time, whatever became of the others.

Users who wait for an answer send less while the server is slow, so the requests that would have
suffered are never sent (coordinated omission). Here each request has a scheduled start, and its
latency counts from then, even where this process itself is late.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

import gevent
from gevent.pool import Group

MAX_IN_FLIGHT = 2_000

Arrival = tuple[float, str]  # seconds since the start, and a kind of traffic


def poisson(
    rate_at: Callable[[float], float], seconds: float, weights: dict[str, float], rng: random.Random
) -> Iterator[Arrival]:
    """A Poisson process whose rate, in requests per second, changes over time (thinning)."""
    most = max(rate_at(seconds * i / 1_000) for i in range(1_001))
    kinds, shares = [*weights], [*weights.values()]
    at = rng.expovariate(most)
    while at < seconds:
        if rng.random() * most < rate_at(at):
            yield at, rng.choices(kinds, shares)[0]
        at += rng.expovariate(most)


class OpenLoop:
    """Runs `call(kind, due)` for each arrival in a greenlet of its own.

    `due` is in seconds since 1970. `fail(kind, due, why)` hears of requests that were not sent or
    not answered.
    """

    def __init__(
        self,
        call: Callable[[str, float], None],
        fail: Callable[[str, float, str], None],
        limit: int = MAX_IN_FLIGHT,
    ) -> None:
        self._call = call
        self._fail = fail
        self._limit = limit
        self._in_flight: dict[gevent.Greenlet, Arrival] = {}
        self._group = Group()
        self.late_s = 0.0  # the latest that this process has started a request

    def run(self, arrivals: Iterator[Arrival]) -> None:
        """Returns once every request is answered."""
        start = time.time()
        for at, kind in arrivals:
            due = start + at
            gevent.sleep(max(0.0, due - time.time()))
            self.late_s = max(self.late_s, time.time() - due)
            if len(self._in_flight) >= self._limit:
                self._fail(kind, due, f"not sent: {self._limit} requests were in flight")
                continue
            greenlet = self._group.spawn(self._call, kind, due)
            self._in_flight[greenlet] = due, kind
            greenlet.link(self._in_flight.pop)
        self._group.join()

    def stop(self) -> None:
        """Gives up on the requests in flight."""
        for due, kind in list(self._in_flight.values()):
            self._fail(kind, due, "not answered when the run ended")
        self._group.kill(block=False)
