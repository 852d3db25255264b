"""Calls that start together end together."""

from __future__ import annotations

import asyncio

import pytest

from blip2_serve.concurrency import gather


async def test_results_come_in_the_order_of_the_calls() -> None:
    async def after(turns: int) -> int:
        for _ in range(turns):
            await asyncio.sleep(0)
        return turns

    assert await gather(map(after, (3, 1, 2))) == [3, 1, 2]
    assert await gather([]) == []


async def test_a_failure_ends_the_other_calls() -> None:
    ended = []

    async def work(name: str) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(name)

    async def fail() -> None:
        await asyncio.sleep(0)
        raise KeyError("unexpected")

    with pytest.raises(KeyError, match="unexpected"):
        await gather([work("a"), fail(), work("b")])
    assert sorted(ended) == ["a", "b"]
