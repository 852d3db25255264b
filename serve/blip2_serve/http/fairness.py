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
from collections.abc import Callable
from dataclasses import dataclass, field

FAIR_EVERY = 10  # turns
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
