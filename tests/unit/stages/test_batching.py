"""The batching thread: computes waiting items together, in order, and only while wanted."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from blip2_serve.errors import TimedOut
from blip2_serve.observe.instruments import Batch
from blip2_serve.stages.batching import BatchThread


class Doubling:
    """Doubles numbers; remembers batches and threads; blocks while its gate is closed."""

    def __init__(self, limit: int = 3, prepare: Callable[[], None] | None = None) -> None:
        self.now: float | None = 0.0  # by the thread's clock; None: as time goes
        self.batches: list[list[int]] = []
        self.threads: list[threading.Thread] = []
        self.started = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.observed: list[Batch] = []
        self.batching = BatchThread(
            prepare or self._note_thread, self._compute, limit, self.observed.append, self._clock
        )

    def _clock(self) -> float:
        return time.perf_counter() if self.now is None else self.now

    def _note_thread(self) -> None:
        self.threads.append(threading.current_thread())

    def _compute(self, numbers: list[int]) -> list[int]:
        self._note_thread()
        self.batches.append(numbers)
        self.started.release()
        self.gate.wait()
        if 13 in numbers:
            raise ArithmeticError("thirteen")
        return [2 * number for number in numbers]

    async def blocked_by(self, number: int) -> asyncio.Task[int]:
        """Starts a batch of one that ends when the gate is opened."""
        self.gate.clear()
        task = asyncio.create_task(self.batching.result_of(number))
        await asyncio.to_thread(self.started.acquire)
        return task

    async def wait(self, *numbers: int) -> list[asyncio.Task[int]]:
        tasks = [asyncio.create_task(self.batching.result_of(number)) for number in numbers]
        await asyncio.sleep(0)  # every number is in the queue now
        return tasks


async def test_a_batch_is_observed_with_how_long_each_item_waited() -> None:
    doubling = Doubling()
    doubling.now = None
    first = await doubling.blocked_by(1)
    others = await doubling.wait(2, 3)
    assert doubling.batching.waiting == 2
    doubling.gate.set()
    await asyncio.gather(first, *others)
    first_batch, second = doubling.observed
    assert len(first_batch.waited) == 1
    assert len(second.waited) == 2
    # They waited while the first one was computed, or a little less.
    assert all(0 < waited < first_batch.seconds for waited in second.waited)
    assert doubling.batching.waiting == 0


async def test_a_failing_observer_fails_no_batch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def observe(_: Batch) -> None:
        raise ArithmeticError("not measured")

    batching = BatchThread(lambda: None, lambda numbers: numbers, 3, observe)
    async with asyncio.timeout(10):
        assert [await batching.result_of(number) for number in (1, 2)] == [1, 2]
    assert batching.failure is None
    logged = [r.exc_info[0] for r in caplog.records if r.exc_info]
    assert logged.count(ArithmeticError) == 1  # only the first one is logged


async def test_failure_holds_what_the_last_batch_raised_until_one_succeeds() -> None:
    doubling = Doubling()
    with pytest.raises(ArithmeticError, match="thirteen"):
        await doubling.batching.result_of(13)
    assert isinstance(doubling.batching.failure, ArithmeticError)
    assert await doubling.batching.result_of(2) == 4
    assert doubling.batching.failure is None


async def test_items_that_arrive_during_a_batch_form_the_next_one_up_to_the_limit() -> None:
    doubling = Doubling(limit=3)
    first = await doubling.blocked_by(1)
    others = await doubling.wait(2, 3, 4, 5)
    doubling.gate.set()
    assert await asyncio.gather(first, *others) == [2, 4, 6, 8, 10]
    assert doubling.batches == [[1], [2, 3, 4], [5]]


async def test_everything_happens_in_one_thread_of_its_own() -> None:
    doubling = Doubling()
    await doubling.batching.prepared
    assert await doubling.batching.result_of(4) == 8
    prepared, computed = doubling.threads
    assert prepared is computed is not threading.current_thread()


async def test_items_whose_callers_left_are_dropped_and_counted() -> None:
    doubling = Doubling()
    first = await doubling.blocked_by(1)
    left, stayed = await doubling.wait(2, 3)
    left.cancel()
    await asyncio.wait([left])
    doubling.gate.set()
    assert await stayed == 6
    assert await first == 2
    assert doubling.batches == [[1], [3]]
    assert [batch.dropped for batch in doubling.observed] == [0, 1]


async def test_items_whose_time_is_over_are_not_computed_and_are_counted() -> None:
    doubling = Doubling()
    first = await doubling.blocked_by(1)
    timely = asyncio.create_task(doubling.batching.result_of(2, 6.0))
    late = asyncio.create_task(doubling.batching.result_of(3, 5.0))
    (left,) = await doubling.wait(4)
    left.cancel()
    await asyncio.wait([left])
    doubling.now = 5.0
    doubling.gate.set()
    with pytest.raises(TimedOut):
        await late
    assert await timely == 4
    assert await first == 2
    assert doubling.batches == [[1], [2]]
    assert [(batch.expired, batch.dropped) for batch in doubling.observed] == [(0, 0), (1, 1)]


async def test_a_batch_that_does_not_end_is_noticed() -> None:
    doubling = Doubling()
    assert doubling.batching.stalled_s == 0
    first = await doubling.blocked_by(1)
    doubling.now = 7.0
    assert doubling.batching.stalled_s == 7
    assert doubling.batching.usual_s == 0
    doubling.gate.set()
    assert await first == 2
    assert doubling.batching.usual_s == 21  # a full batch has three items
    async with asyncio.timeout(10):
        while doubling.batching._progress._since is not None:
            await asyncio.sleep(0)
    doubling.now = 50.0
    assert doubling.batching.stalled_s == 0  # idle


async def test_an_expired_item_is_refused_before_the_next_one_comes() -> None:
    doubling = Doubling()
    with pytest.raises(TimedOut):
        async with asyncio.timeout(10):
            await doubling.batching.result_of(1, 0.0)
    assert await doubling.batching.result_of(2) == 4


async def test_a_caller_that_leaves_during_its_batch_does_not_affect_the_others() -> None:
    doubling = Doubling()
    first = await doubling.blocked_by(1)
    leaving, staying = await doubling.wait(2, 3)
    first.cancel()
    doubling.gate.set()
    leaving_started = asyncio.to_thread(doubling.started.acquire)
    await leaving_started
    leaving.cancel()
    assert await staying == 6
    assert await doubling.batching.result_of(5) == 10


async def test_a_failed_batch_fails_its_own_callers_only() -> None:
    doubling = Doubling(limit=2)
    first = await doubling.blocked_by(1)
    tasks = await doubling.wait(13, 2, 3)
    doubling.gate.set()
    results = await asyncio.gather(first, *tasks, return_exceptions=True)
    assert [str(r) for r in results] == ["2", "thirteen", "thirteen", "6"]


async def test_prepared_raises_what_prepare_raised() -> None:
    def fail() -> None:
        raise FileNotFoundError("no checkpoint")

    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        await Doubling(prepare=fail).batching.prepared


class Panic(BaseException):
    """What a Rust library raises."""


async def test_the_thread_survives_a_panic() -> None:
    def compute(numbers: list[int]) -> list[int]:
        if 13 in numbers:
            raise Panic("thirteen")
        return numbers

    batching = BatchThread(lambda: None, compute, 3)
    async with asyncio.timeout(10):
        with pytest.raises(RuntimeError, match="thirteen"):
            await batching.result_of(13)
        assert batching.failure
        assert await batching.result_of(2) == 2


async def test_prepared_raises_a_panic_of_prepare() -> None:
    def fail() -> None:
        raise Panic("no checkpoint")

    with pytest.raises(Panic, match="no checkpoint"):
        async with asyncio.timeout(10):
            await Doubling(prepare=fail).batching.prepared
