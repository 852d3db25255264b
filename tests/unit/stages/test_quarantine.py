"""The quarantine: suspects run alone, in turn, and content that kills is refused."""

from __future__ import annotations

import asyncio

import pytest

from blip2_serve.errors import Quarantined
from blip2_serve.stages.quarantine import QUARANTINE_S, Quarantine


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_content_is_refused_for_some_minutes() -> None:
    clock = Clock()
    quarantine = Quarantine(clock)
    assert not quarantine.put("killer").should_retry
    quarantine.check("harmless")
    with pytest.raises(Quarantined):
        quarantine.check("killer")
    clock.now = QUARANTINE_S + 1

    quarantine.check("killer")


async def test_suspects_take_turns_and_the_smallest_goes_first() -> None:
    quarantine = Quarantine(Clock())
    order: list[float] = []

    async def suspect(size: float) -> None:
        await quarantine.turn(size)
        order.append(size)
        await asyncio.sleep(0)
        quarantine.done()

    await asyncio.gather(*(suspect(size) for size in (5.0, 9.0, 1.0, 3.0)))

    assert order == [5.0, 1.0, 3.0, 9.0]


async def test_a_suspect_that_leaves_while_it_waits_keeps_nobody_waiting() -> None:
    quarantine = Quarantine(Clock())
    await quarantine.turn(1)
    second = asyncio.create_task(quarantine.turn(2))
    third = asyncio.create_task(quarantine.turn(3))
    await asyncio.sleep(0)
    second.cancel()
    quarantine.done()

    await third


async def test_a_suspect_that_leaves_as_its_turn_comes_passes_it_on() -> None:
    quarantine = Quarantine(Clock())
    await quarantine.turn(1)
    second = asyncio.create_task(quarantine.turn(2))
    third = asyncio.create_task(quarantine.turn(3))
    await asyncio.sleep(0)
    quarantine.done()
    second.cancel()

    await asyncio.wait_for(third, 5)


async def test_nothing_else_runs_where_a_suspect_does() -> None:
    quarantine = Quarantine(Clock())
    replicas = ["a", "b"]
    assert quarantine.allowed(replicas, alone=False) == replicas
    await quarantine.turn(1)
    (chosen,) = quarantine.allowed(replicas, alone=True)

    assert quarantine.allowed(replicas, alone=True) == [chosen]
    assert quarantine.allowed(replicas, alone=False) == [r for r in replicas if r != chosen]
    assert quarantine.allowed([chosen], alone=False) == []
    quarantine.done()
    assert quarantine.allowed(replicas, alone=False) == replicas
