"""The ingress's feature cache: computes once, shares with all who wait, evicts the oldest."""

from __future__ import annotations

import asyncio
import contextvars
import gc
from collections import Counter
from collections.abc import Callable

import pytest

from blip2_serve.errors import InvalidImage
from blip2_serve.serve_internals import detached_context
from blip2_serve.stages.feature_cache import FeatureCache
from blip2_serve.types import ImageFeatures


class Encoder:
    """Counts computations, which end once `gate` is set."""

    def __init__(self, *, open_gate: bool = True) -> None:
        self.calls: Counter[str] = Counter()
        self.gate = asyncio.Event()
        self.started = asyncio.Event()
        self.failure: Exception | None = None
        if open_gate:
            self.gate.set()

    async def get(self, cache: FeatureCache, name: str) -> ImageFeatures:
        return await cache.get(name, lambda: self._compute(name))

    async def _compute(self, name: str) -> ImageFeatures:
        self.calls[name] += 1
        self.started.set()
        await self.gate.wait()
        if self.failure:
            raise self.failure
        return ImageFeatures(name, b"", (0, 8), "float32")


async def waiters(
    encoder: Encoder, cache: FeatureCache, count: int
) -> list[asyncio.Task[ImageFeatures]]:
    """Starts `count` tasks that all wait for one computation under way."""
    tasks = [asyncio.create_task(encoder.get(cache, "a")) for _ in range(count)]
    async with asyncio.timeout(10):
        await encoder.started.wait()
    return tasks


@pytest.mark.parametrize("entries", [8, 0])
async def test_an_image_asked_for_32_times_at_once_is_computed_once(entries: int) -> None:
    encoder, cache = Encoder(open_gate=False), FeatureCache(entries)
    tasks = await waiters(encoder, cache, 32)
    encoder.gate.set()

    assert {features.digest for features in await asyncio.gather(*tasks)} == {"a"}
    assert encoder.calls["a"] == 1


async def test_kept_features_are_not_computed_again() -> None:
    encoder, cache = Encoder(), FeatureCache(1)

    assert await encoder.get(cache, "a") is await encoder.get(cache, "a")
    assert encoder.calls["a"] == 1


async def test_different_images_are_computed_concurrently() -> None:
    encoder, cache = Encoder(open_gate=False), FeatureCache(2)
    tasks = [asyncio.create_task(encoder.get(cache, name)) for name in "ab"]
    async with asyncio.timeout(10):
        while len(encoder.calls) < 2:
            await asyncio.sleep(0)
    encoder.gate.set()

    assert [features.digest for features in await asyncio.gather(*tasks)] == ["a", "b"]


@pytest.mark.parametrize("leaving", [0, 1], ids=["the first one leaves", "a later one leaves"])
async def test_a_client_that_leaves_does_not_cancel_it_for_the_others(leaving: int) -> None:
    encoder, cache = Encoder(open_gate=False), FeatureCache(8)
    tasks = await waiters(encoder, cache, 3)
    tasks.pop(leaving).cancel()
    await asyncio.sleep(0)  # the cancellation arrives
    encoder.gate.set()

    assert {features.digest for features in await asyncio.gather(*tasks)} == {"a"}
    assert encoder.calls["a"] == 1


async def test_nothing_is_computed_for_clients_that_have_all_left() -> None:
    encoder, cache = Encoder(open_gate=False), FeatureCache(8)
    tasks = await waiters(encoder, cache, 2)
    (encoding,) = cache._under_way.values()
    for task in tasks:
        task.cancel()
    await asyncio.wait([*tasks, encoding])

    assert encoding.cancelled()
    assert "a" not in cache


async def test_a_client_that_comes_as_the_last_one_leaves_is_answered() -> None:
    encoder, cache = Encoder(open_gate=False), FeatureCache(8)
    (leaving,) = await waiters(encoder, cache, 1)
    leaving.cancel()
    await asyncio.sleep(0)
    encoder.gate.set()

    assert (await encoder.get(cache, "a")).digest == "a"
    assert "a" in cache


async def test_a_failure_as_every_client_leaves_is_not_logged_as_unretrieved(
    caplog: pytest.LogCaptureFixture,
) -> None:
    encoder, cache = Encoder(open_gate=False), FeatureCache(8)
    encoder.failure = InvalidImage("broken")
    clients = await waiters(encoder, cache, 2)
    (encoding,) = cache._under_way.values()
    encoder.gate.set()
    for client in clients:
        client.cancel()
    await asyncio.wait([*clients, encoding])
    del encoding, clients, client
    gc.collect()  # asyncio complains when the task is freed

    assert "never retrieved" not in caplog.text


async def test_an_error_reaches_every_waiter_and_is_not_kept() -> None:
    encoder, cache = Encoder(open_gate=False), FeatureCache(8)
    encoder.failure = InvalidImage("broken")
    tasks = await waiters(encoder, cache, 3)
    encoder.gate.set()
    errors = await asyncio.gather(*tasks, return_exceptions=True)

    assert [str(error) for error in errors] == ["broken"] * 3
    encoder.failure = None
    assert (await encoder.get(cache, "a")).digest == "a"
    assert encoder.calls["a"] == 2


async def test_the_least_recently_used_features_are_evicted() -> None:
    encoder, cache = Encoder(), FeatureCache(2)
    for name in "abac":  # `a` is used again before `c` comes, so `b` goes
        await encoder.get(cache, name)
    assert encoder.calls == {"a": 1, "b": 1, "c": 1}

    for name in "acb":
        await encoder.get(cache, name)
    assert encoder.calls == {"a": 1, "b": 2, "c": 1}


async def test_a_cache_without_entries_keeps_nothing() -> None:
    encoder, cache = Encoder(), FeatureCache(0)
    for _ in range(2):
        await encoder.get(cache, "a")

    assert encoder.calls["a"] == 2


@pytest.mark.parametrize("new_context", [contextvars.Context, detached_context])
async def test_a_computation_does_not_run_in_the_context_of_the_request_that_started_it(
    new_context: Callable[[], contextvars.Context],
) -> None:
    request = contextvars.ContextVar("request", default="none")
    seen = []

    async def compute() -> ImageFeatures:
        seen.append(request.get())
        return ImageFeatures("a", b"", (0, 8), "float32")

    request.set("the first client's")
    await FeatureCache(1, new_context).get("a", compute)

    assert seen == ["none"]


async def test_each_lookup_tells_its_result() -> None:
    results: list[str] = []
    encoder, cache = Encoder(open_gate=False), FeatureCache(1, on_lookup=results.append)
    tasks = await waiters(encoder, cache, 2)
    encoder.gate.set()
    await asyncio.gather(*tasks)
    await encoder.get(cache, "a")

    assert results == ["miss", "joined", "hit"]
