"""Whose request goes on to the stages next. No Ray.

Each tenant has a counter: the seconds of work that the stages did for it. Of those that wait, the
one with the lowest counter goes next, as in VTC (arXiv 2401.00588), so the counters of two that
keep waiting come to differ by no more than the cost of two requests. Who did not wait starts near
where the others are: it saves up no more than CREDIT_S, which is what lets the few requests of a
small tenant pass by the queue of a large one.

Requests of a lower `priority` number go first, but every tenth turn asks for the counter alone.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

FAIR_EVERY = 10  # turns
SEVERAL_FOR_S = 60.0  # after the last request that was not of the kind of the one before
MOST_TENANTS = 1024  # that are remembered without a request under way
CREDIT_S = 2.0  # with 0, the slowest of small tenants' requests take twice as long


@dataclass
class Work:
    """What requests still ask of the stages."""

    requests: int = 0
    images: float = 0.0  # to encode
    answers: float = 0.0  # average ones


@dataclass(eq=False)
class Tenant:
    """Whose requests share a queue: those of one API key, or all."""

    name: str
    queued: Work = field(default_factory=Work)  # of requests that have not had their turn
    requests: int = 0  # under way
    bytes: int = 0  # of their bodies
    slow: int = 0  # bodies that take long to arrive
    smooth_wait: float = 0.0  # seconds, over the latest arrivals
    served: float = 0.0  # seconds of work
    waiting: int = 0  # requests that could go on at once


class Tenants:
    """All that have sent requests, but for those of long ago."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tenants: dict[str, Tenant] = {}
        self._last: tuple[Tenant, int] | None = None  # and the priority of its request
        self._several_until = -math.inf

    def get(self, name: str) -> Tenant:
        if name not in self._tenants and len(self._tenants) >= MOST_TENANTS:
            self._tenants = {n: t for n, t in self._tenants.items() if t.requests}
        return self._tenants.setdefault(name, Tenant(name))

    def saw(self, tenant: Tenant, priority: int) -> None:
        """Takes note of a request."""
        if self._last not in (None, (tenant, priority)):
            self._several_until = self._clock() + SEVERAL_FOR_S
        self._last = tenant, priority

    @property
    def are_several(self) -> bool:
        """Whether requests have lately come from several tenants, or with several priorities."""
        return self._clock() < self._several_until

    @property
    def waiting(self) -> int:
        """How many have requests that have not had their turn."""
        return sum(tenant.queued.requests > 0 for tenant in self._tenants.values())

    def share(self, most: int) -> float:
        """What one of them may have of something that is limited."""
        present = sum(tenant.requests > 0 for tenant in self._tenants.values())
        return most / max(2, present) if self.are_several else most

    def __iter__(self) -> Iterator[Tenant]:
        return iter(self._tenants.values())


@dataclass(eq=False)
class _Waiting:
    tenant: Tenant
    priority: int
    cost_s: float
    go: Callable[[], None]
    turn: asyncio.Future[None]


class FairQueue:
    """Requests that wait for their turn.

    Args:
        has_room: Whether the stages should get one more request now.
    """

    def __init__(self, has_room: Callable[[], bool]) -> None:
        self._has_room = has_room
        self._waiting: list[_Waiting] = []  # in order of arrival
        self._turns = 0
        self._served = 0.0  # the counter of the last tenant that had its turn

    async def turn(
        self, tenant: Tenant, priority: int, cost_s: float, go: Callable[[], None]
    ) -> bool:
        """Waits for the turn of a request that costs so many seconds; then `go` has been called.

        Returns whether it had to wait.
        """
        if not tenant.waiting:
            tenant.served = max(tenant.served, self._least() - CREDIT_S)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(tenant, priority, cost_s, go, turn)
        self._waiting.append(waiting)
        tenant.waiting += 1
        self.advance()
        if turn.done():
            return False
        try:
            await turn
        except asyncio.CancelledError:
            if waiting in self._waiting:
                self._remove(waiting)
            raise
        return True

    def advance(self) -> None:
        """Lets requests go on while the stages have room."""
        while self._waiting and self._has_room():
            waiting = min(self._waiting, key=self._place)
            self._remove(waiting)
            if waiting.turn.cancelled():
                continue
            self._turns += 1
            self._served = waiting.tenant.served
            waiting.tenant.served += waiting.cost_s
            waiting.go()
            waiting.turn.set_result(None)

    def __len__(self) -> int:
        return len(self._waiting)

    def _place(self, waiting: _Waiting) -> tuple[int, float]:
        fair = self._turns % FAIR_EVERY == 0
        return (0 if fair else waiting.priority), waiting.tenant.served

    def _remove(self, waiting: _Waiting) -> None:
        self._waiting.remove(waiting)
        waiting.tenant.waiting -= 1

    def _least(self) -> float:
        return min((waiting.tenant.served for waiting in self._waiting), default=self._served)
