"""Fair shares: tenants and priorities, on a simulated server with a clock of its own."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest

from blip2_serve.errors import Overloaded
from blip2_serve.http.admission import Admission, Ticket
from blip2_serve.http.fairness import FAIR_EVERY, MOST_TENANTS, FairQueue, Tenant
from blip2_serve.http.refusals import Capacity
from blip2_serve.ingress_config import AdmissionConfig
from support.recorder import FakeRecorder

STEP_S = 0.01
PER_S = 20.0  # average answers


@dataclass(eq=False)
class Sent:
    """A request: when, whose, and how many average answers' worth of work it is."""

    at: float
    tenant: str
    size: float = 1.0
    priority: int = 0
    body_bytes: int = 1000
    outcome: str = ""
    took_s: float = 0.0
    left: float = field(init=False)  # of the work

    def __post_init__(self) -> None:
        self.left = self.size


class Simulation:
    """A generator that works on what it has at once, sharing its time, as batches do."""

    def __init__(self, seed: int = 0, **limits: Any) -> None:
        self.now = 0.0
        self.admission = Admission(
            AdmissionConfig.model_validate({"min_requests": 1, **limits}),
            lambda: Capacity(1e9, PER_S),
            FakeRecorder(),
            clock=lambda: self.now,
            draw=Random(seed).random,
        )
        self.working: dict[Sent, Ticket] = {}
        self.most_apart = 0.0  # of the counters of two tenants that wait

    async def run(self, requests: list[Sent], until_s: float) -> None:
        """Sends them at their times, and goes on until then."""
        arrivals = iter(sorted(requests, key=lambda sent: sent.at))
        upcoming = next(arrivals, None)
        tasks: list[asyncio.Task[None]] = []
        while self.now < until_s:
            while upcoming and upcoming.at <= self.now:
                tasks.append(asyncio.create_task(self._send(upcoming)))
                upcoming = next(arrivals, None)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            self._work()
            waiting = {w.tenant for w in self.admission._queue._waiting}
            counters = [tenant.served for tenant in waiting]
            self.most_apart = max(
                self.most_apart, max(counters, default=0) - min(counters, default=0)
            )
            self.now += STEP_S
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks)

    async def _send(self, sent: Sent) -> None:
        try:
            with self.admission.enter(sent.body_bytes, sent.tenant) as ticket:
                ticket.plan(0, sent.size, None, sent.priority)
                await ticket.turn()
                self.working[sent] = ticket
                while sent in self.working:
                    await asyncio.sleep(0)
        except Overloaded:
            sent.outcome = "refused"

    def _work(self) -> None:
        work = PER_S * STEP_S
        for sent, ticket in [*self.working.items()]:  # the oldest first
            done = min(work, sent.left)
            sent.left -= done
            work -= done
            if sent.left <= 1e-9:
                del self.working[sent]
                sent.outcome, sent.took_s = "answered", self.now + STEP_S - sent.at
                ticket.answered(round(10 * sent.size), 1)


def stream(
    tenant: str,
    per_s: float,
    until_s: float,
    seed: int,
    sizes: tuple[float, ...] = (1.0,),
    priority: int = 0,
) -> Iterator[Sent]:
    random, at = Random(seed), 0.0
    while (at := at + random.expovariate(per_s)) < until_s:
        yield Sent(at, tenant, random.choice(sizes), priority)


def work_of(tenant: str, requests: list[Sent]) -> float:
    return sum(
        sent.size for sent in requests if sent.tenant == tenant and sent.outcome == "answered"
    )


async def test_tenants_that_keep_waiting_get_equal_shares_whatever_they_send() -> None:
    requests = [
        *stream("one", 60, 60, seed=1, sizes=(1.0,)),
        *stream("large", 20, 60, seed=2, sizes=(2.0, 4.0)),
        *stream("flood", 300, 60, seed=3, sizes=(0.5, 1.0)),
    ]
    simulation = Simulation()
    await simulation.run(requests, 60)

    shares = [work_of(name, requests) for name in ("one", "large", "flood")]
    assert sum(shares) > 0.9 * PER_S * 60
    assert min(shares) > 0.9 * max(shares), shares
    assert simulation.most_apart <= 2 * 4.0 / PER_S + 1e-9


async def test_a_flood_of_one_tenant_delays_no_other() -> None:
    """At 50 times its share, against the same tenant sending its share of a busy server."""

    async def slowest(flood_per_s: float) -> float:
        quiet = [s for i in range(3) for s in stream(f"quiet {i}", 0.2 * PER_S, 200, seed=i)]
        requests = [*quiet, *stream("flood", flood_per_s, 200, seed=9)]
        await Simulation().run(requests, 205)
        assert {s.outcome for s in quiet} == {"answered"}
        return statistics.quantiles([s.took_s for s in quiet], n=100)[-1]

    usual = await slowest(0.2 * PER_S)
    assert await slowest(50 * 0.2 * PER_S) < 1.5 * usual


async def test_while_all_requests_are_of_one_kind_none_waits_for_its_turn() -> None:
    simulation = Simulation()
    waited = []
    for _ in range(20):
        ticket = simulation.admission.enter(1000, "one")
        ticket.__enter__()
        ticket.plan(0, 1.0, None)
        waited.append(simulation.admission.stats()["waiting"])
        await asyncio.wait_for(ticket.turn(), 1)
    assert not any(waited)


async def test_urgent_requests_go_first_and_others_still_go() -> None:
    urgent = [*stream("one", 30, 60, seed=1, priority=-5)]
    usual = [*stream("two", 30, 60, seed=2)]
    bulk = [*stream("two", 30, 60, seed=3, priority=10)]
    await Simulation().run([*urgent, *usual, *bulk], 60)

    done = [sum(s.outcome == "answered" for s in some) for some in (urgent, usual, bulk)]
    assert sum(done) > 0.9 * PER_S * 60
    assert done[0] > 0.8 * sum(done)
    assert done[1] > done[2] > 0.01 * sum(done)


async def test_bulk_alone_uses_the_whole_server_and_leaves_room_for_others() -> None:
    bulk = [*stream("one", 100, 30, seed=3, priority=10)]
    usual = [Sent(10 + 2.0 * i, "one") for i in range(8)]
    await Simulation().run([*bulk, *usual], 32)

    assert work_of("one", bulk) > 0.9 * PER_S * 30
    assert {s.outcome for s in usual} == {"answered"}
    first, *others = [s.took_s for s in usual]
    assert first < 1.2  # nobody knew that it would come
    assert max(others) < 0.5


def queue_of(room: list[bool]) -> FairQueue:
    return FairQueue(lambda: bool(room and room.pop()))


async def go(
    queue: FairQueue, gone: list[str], tenant: Tenant, cost_s: float, priority: int = 0
) -> None:
    await queue.turn(tenant, priority, cost_s, lambda: gone.append(tenant.name))


async def test_what_a_tenant_did_not_use_is_not_saved_up() -> None:
    """One has had 100 requests of a second each; the other comes only now."""
    room: list[bool] = []
    queue, gone = queue_of(room), []
    old, new = Tenant("old"), Tenant("new")
    for _ in range(100):
        room.append(True)
        await go(queue, gone, old, 1.0)
    gone.clear()
    tasks = [asyncio.create_task(go(queue, gone, t, 1.0)) for t in [old, new] * 8]
    await asyncio.sleep(0)
    room += [True] * 8
    queue.advance()
    await asyncio.sleep(0)

    assert gone[:2] == ["new", "new"]  # as much as the credit is worth
    assert gone.count("old") >= 3
    for task in tasks:
        task.cancel()


async def test_every_tenth_turn_asks_nothing_of_the_priority() -> None:
    room: list[bool] = []
    queue, gone = queue_of(room), []
    tenants = Tenant("urgent"), Tenant("bulk")
    tasks = [
        asyncio.create_task(go(queue, gone, tenant, 0.01, priority))
        for tenant, priority in zip(tenants, (0, 9), strict=True)
        for _ in range(5 * FAIR_EVERY)
    ]
    await asyncio.sleep(0)
    room += [True] * (3 * FAIR_EVERY + 1)  # the first one of them is equal
    queue.advance()
    await asyncio.sleep(0)

    assert gone.count("bulk") == 3
    for task in tasks:
        task.cancel()


async def test_who_gives_up_while_waiting_leaves_nothing_and_keeps_nobody_waiting() -> None:
    simulation = Simulation(max_wait_s=10.0)
    requests = [Sent(0.0, name) for _ in range(20) for name in ("a", "b")]
    tasks = [asyncio.create_task(simulation._send(sent)) for sent in requests]
    await asyncio.sleep(0)
    assert simulation.admission.stats()["waiting"] > 10
    before = simulation.admission.stats()["waiting"]
    for task in tasks[20::2]:  # none of those that the stages have
        task.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert simulation.admission.stats()["waiting"] <= before - 10
    for _ in range(1000):
        await asyncio.sleep(0)
        simulation._work()
        simulation.now += STEP_S
    await asyncio.gather(*tasks, return_exceptions=True)

    assert [sent.outcome for sent in requests[1::2]] == ["answered"] * 20
    assert not any(map(round, simulation.admission.stats().values()))
    assert not any(t.requests or t.waiting or t.bytes for t in simulation.admission._tenants)


async def test_a_tenant_pays_for_what_was_done_not_for_what_was_planned() -> None:
    simulation = Simulation()
    for tokens, expected in ((10, 1 / PER_S), (2, 0.2 / PER_S)):
        simulation.admission.learn(10, 1)
        simulation.admission._mean_work = 10.0
        with simulation.admission.enter(1000, f"{tokens}") as ticket:
            ticket.plan(0, 1.0, None)
            await ticket.turn()
            ticket.answered(tokens, 1)
        served = simulation.admission._tenants.get(f"{tokens}").served
        assert served == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("held", ["declared", "as they come"])
def test_bytes_of_one_tenant_leave_room_for_those_of_another(held: str) -> None:
    simulation = Simulation(max_held_bytes=1000, min_requests=100)
    for name in ("small", "greedy"):  # so it is known that there are two
        with simulation.admission.enter(1, name) as ticket:
            ticket.plan(0, 1.0, None)
    greedy = [
        simulation.admission.enter(0 if held == "as they come" else 250, "greedy").__enter__()
        for _ in range(2)
    ]
    if held == "as they come":
        for ticket in greedy:
            ticket.received(250)
        with pytest.raises(Overloaded):
            greedy[0].received(1)
    with pytest.raises(Overloaded):
        simulation.admission.enter(250, "greedy")
    simulation.admission.enter(250, "small").__enter__().received(250)


def test_slow_bodies_of_one_tenant_leave_room_for_those_of_another() -> None:
    simulation = Simulation(max_slow_bodies=4, min_requests=100)
    for name in ("small", "greedy"):
        with simulation.admission.enter(1, name) as ticket:
            ticket.plan(0, 1.0, None)
    for _ in range(2):
        simulation.admission.enter(1, "greedy").__enter__().slow()
    with pytest.raises(Overloaded):
        simulation.admission.enter(1, "greedy").__enter__().slow()
    simulation.admission.enter(1, "small").__enter__().slow()


def test_tenants_without_requests_are_forgotten() -> None:
    simulation = Simulation()
    with simulation.admission.enter(1, "here"):
        for number in range(3000):
            with simulation.admission.enter(1, f"{number}"):
                pass
        names = [tenant.name for tenant in simulation.admission._tenants]
        assert len(names) <= MOST_TENANTS
        assert "here" in names
