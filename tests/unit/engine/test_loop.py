from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from typing import Any

import pytest

from blip2_serve.compute.sampler import Choice
from blip2_serve.engine.engine import Engine
from blip2_serve.engine.loop import EngineLoop, Step
from blip2_serve.engine.scheduler import Scheduler
from blip2_serve.engine.sequence import Chunk, Request, Sequence
from blip2_serve.engine.slots import KvSlots
from blip2_serve.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    Overloaded,
    TimedOut,
    Unavailable,
)
from blip2_serve.types import TokenEvent, TokenLogprob
from support.requests import make_request

DEADLINE = 20.0  # seconds until a test fails instead of hanging


class GatedRunner:
    """Runs only as many steps as `allow` permits; `fail` makes the next one raise."""

    def __init__(self) -> None:
        self.permits = threading.Semaphore(0)
        self.failing = False

    def allow(self, steps: int) -> None:
        self.permits.release(steps)

    def fail(self) -> None:
        self.failing = True
        self.allow(1)

    def run(self, chunks: list[Chunk]) -> None:
        assert chunks
        assert self.permits.acquire(timeout=DEADLINE)
        if self.failing:
            raise RuntimeError("the device is gone")


class AlphabetSampler:
    """Chooses a, b, c, ... for the first sample, b, c, d, ... for the second, and so on."""

    def choose(
        self, logits: Any, rows: list[int], sequences: list[Sequence]
    ) -> Callable[[], list[Choice]]:
        assert logits is None
        assert len(rows) == len(sequences)
        tokens = [ord("a") + (len(s.output) + s.index) % 26 for s in sequences]
        return lambda: [Choice(token, TokenLogprob(token, -1.0)) for token in tokens]

    def expand(self, *_: Any) -> list[Any]:
        raise AssertionError("there are no beams here")


class Bench:
    """An engine loop whose steps a test controls, unless it is `free` running."""

    def __init__(
        self,
        max_num_seqs: int = 4,
        max_waiting: int = 100,
        free: bool = False,
        eos: tuple[int, ...] = (),
        events_per_s: float = math.inf,
        observe: Callable[[Step], None] = lambda _: None,
    ) -> None:
        self.now = 0.0  # the loop's clock
        self.runner = GatedRunner()
        if free:
            self.runner.allow(1_000_000)
        scheduler = Scheduler(
            KvSlots(1000),
            max_num_seqs=max_num_seqs,
            max_waiting=max_waiting,
            max_num_batched_tokens=32,
            prefix_caching=False,
        )
        self.engine = Engine(
            self.runner,
            scheduler,
            AlphabetSampler(),
            decode=lambda ids: bytes(ids).decode(),
            eos_token_ids=eos,
        )
        self.loop = EngineLoop(
            self.engine, observe=observe, events_per_s=events_per_s, clock=lambda: self.now
        )

    async def collect(self, name: str, max_tokens: int = 5, n: int = 1) -> list[TokenEvent]:
        async with asyncio.timeout(DEADLINE):
            return [event async for event in self.loop.stream(request(name, max_tokens, n))]

    async def begin(
        self, name: str, max_tokens: int = 5, n: int = 1
    ) -> asyncio.Task[list[TokenEvent]]:
        """Starts a reader and puts its request into the inbox, for the engine's next step."""
        task = asyncio.create_task(self.collect(name, max_tokens, n))
        await asyncio.sleep(0)
        return task

    async def until_held(self, count: int) -> None:
        """Waits until the engine has `count` sequences and waiting requests together."""
        await until(lambda: self.loop.stats().running + self.loop.stats().waiting == count)


def request(name: str, max_tokens: int = 5, n: int = 1) -> Request:
    return make_request(name, [1, 2, 3], max_tokens=max_tokens, n=n)


def text(events: list[TokenEvent], index: int = 0) -> str:
    return "".join(event.text for event in events if event.index == index)


def expected(letters: str, reason: Any = None, index: int = 0, last: bool = False) -> TokenEvent:
    logprobs = tuple(TokenLogprob(ord(letter), -1.0) for letter in letters)
    return TokenEvent(tuple(letters.encode()), letters, reason, 3, index, logprobs, last)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.001)


def block_until(condition: Callable[[], object]) -> None:
    """Waits and blocks the event loop meanwhile."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture
def make() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make_bench(**arguments: Any) -> Bench:
        made.append(Bench(**arguments))
        return made[-1]

    yield make_bench
    for bench in made:
        bench.runner.allow(1_000_000)
        bench.loop.close()


async def test_an_answer_is_streamed_token_by_token(make: Callable[..., Bench]) -> None:
    bench = make()
    async with aclosing(bench.loop.stream(request("a", 3))) as stream:
        for letter, reason in [("a", None), ("b", None), ("c", "length")]:
            bench.runner.allow(1)
            event = await anext(stream)
            assert event == expected(letter, reason, last=letter == "c")
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_many_answers_are_streamed_concurrently(make: Callable[..., Bench]) -> None:
    bench = make(max_num_seqs=8, free=True)
    lengths = [1 + n * 7 % 25 for n in range(60)]
    async with asyncio.timeout(DEADLINE):
        answers = await asyncio.gather(
            *(bench.collect(f"r{n}", length) for n, length in enumerate(lengths))
        )
    assert [text(events) for events in answers] == [
        "abcdefghijklmnopqrstuvwxyz"[:length] for length in lengths
    ]
    for events in answers:
        assert [e.finish_reason for e in events] == [None] * (len(events) - 1) + ["length"]
    await bench.until_held(0)


async def test_tokens_queued_by_a_busy_event_loop_are_merged(
    make: Callable[..., Bench],
) -> None:
    bench = make()
    task = await bench.begin("a", 5)
    await bench.until_held(1)
    bench.runner.allow(5)
    block_until(lambda: bench.loop.stats().steps == 5)
    bench.loop.close()
    assert await task == [expected("abcde", "length", last=True)]


async def test_queued_tokens_are_merged_per_answer(
    make: Callable[..., Bench],
) -> None:
    bench = make()
    task = await bench.begin("a", 4, n=3)
    await bench.until_held(1)
    bench.runner.allow(4)
    block_until(lambda: bench.loop.stats().steps == 4)
    bench.loop.close()
    assert await task == [
        expected("abcd", "length", 0),
        expected("bcde", "length", 1),
        expected("cdef", "length", 2, last=True),
    ]


async def test_events_are_paced_to_events_per_s(
    make: Callable[..., Bench],
) -> None:
    bench = make(events_per_s=0.001)  # the second event is due after a quarter of an hour
    async with aclosing(bench.loop.stream(request("a", 5))) as stream:
        bench.runner.allow(1)
        assert await anext(stream) == expected("a")
        bench.runner.allow(4)
        assert await anext(stream) == expected("bcde", "length", last=True)


async def test_a_due_event_is_sent_at_once(make: Callable[..., Bench]) -> None:
    bench = make(events_per_s=1_000_000)
    async with aclosing(bench.loop.stream(request("a", 5))) as stream:
        for letter in "abcd":
            bench.runner.allow(1)
            assert await anext(stream) == expected(letter)


async def test_whole_answers_are_sent_once_and_do_not_count_as_streams(
    make: Callable[..., Bench],
) -> None:
    bench = make(events_per_s=0.001, free=True)
    whole = bench.loop.stream(request("a", 5, n=2), whole=True)
    assert [event async for event in whole] == [
        expected("abcde", "length", 0),
        expected("bcdef", "length", 1, last=True),
    ]
    bench = make()
    waiting = [asyncio.create_task(anext(bench.loop.stream(request(n), whole=True))) for n in "ab"]
    await bench.until_held(2)
    assert bench.loop._streams == 0
    bench.runner.allow(1_000)
    assert {(await task).text for task in waiting} == {"abcde"}


async def test_a_failure_is_sent_before_an_event_is_due(make: Callable[..., Bench]) -> None:
    bench = make(events_per_s=0.001)
    whole = asyncio.create_task(anext(bench.loop.stream(request("a", 50), whole=True)))
    paced = await bench.begin("b", 50)
    bench.runner.allow(3)
    await until(lambda: bench.loop.stats().steps == 3)
    bench.runner.fail()
    async with asyncio.timeout(DEADLINE):
        outcomes = await asyncio.gather(whole, paced, return_exceptions=True)
    assert isinstance(outcomes[1], Unavailable)


async def test_a_request_ends_with_its_last_answer(
    make: Callable[..., Bench],
) -> None:
    bench = make(eos=(ord("c"),))  # the first sample's third token, the second's second
    async with aclosing(bench.loop.stream(request("a", 9, n=2))) as stream:
        bench.runner.allow(1)
        assert [await anext(stream) for _ in range(2)] == [expected("a"), expected("b", index=1)]
        bench.runner.allow(1)
        events = [await anext(stream) for _ in range(2)]
        assert [(e.index, e.finish_reason, e.last) for e in events] == [
            (0, None, False),
            (1, "stop", False),
        ]
        bench.runner.allow(1)
        event = await anext(stream)
        assert (event.index, event.finish_reason, event.last) == (0, "stop", True)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
    await bench.until_held(0)


async def test_closing_a_stream_aborts_its_request_before_the_next_step(
    make: Callable[..., Bench],
) -> None:
    bench = make()
    stream = bench.loop.stream(request("a", 500))
    bench.runner.allow(1)
    assert (await anext(stream)).text == "a"
    await stream.aclose()
    bench.runner.allow(1)  # for a step that may be under way
    await bench.until_held(0)
    assert bench.loop.stats().kv_slots_used == 0
    assert bench.loop.stats().steps <= 2


async def test_cancelling_a_reader_aborts_its_request(make: Callable[..., Bench]) -> None:
    bench = make()
    task = await bench.begin("a", 500)
    await bench.until_held(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    bench.runner.allow(1)
    await bench.until_held(0)
    assert bench.loop.stats().steps <= 1


async def test_cancelling_a_reader_aborts_a_waiting_request(make: Callable[..., Bench]) -> None:
    bench = make(max_num_seqs=1)
    running = await bench.begin("a", 3)
    waiting = await bench.begin("b", 3)
    bench.runner.allow(1)
    await bench.until_held(2)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    bench.runner.allow(2)
    assert text(await running) == "abc"
    await bench.until_held(0)
    assert bench.loop.stats().steps == 3


async def test_an_abort_does_not_affect_other_streams(make: Callable[..., Bench]) -> None:
    bench = make()
    leaving, staying = await bench.begin("a", 400), await bench.begin("b", 20)
    bench.runner.allow(5)
    await until(lambda: bench.loop.stats().steps == 5)
    leaving.cancel()
    bench.runner.allow(1_000)
    assert text(await staying) == "abcdefghijklmnopqrst"
    await bench.until_held(0)


async def test_the_engine_resumes_after_being_idle(make: Callable[..., Bench]) -> None:
    bench = make(free=True)
    for n in range(3):
        assert text(await bench.collect(f"r{n}")) == "abcde"
        await bench.until_held(0)
    assert bench.loop.stats().steps == 15


async def test_a_full_queue_rejects_the_next_request(
    make: Callable[..., Bench],
) -> None:
    bench = make(max_num_seqs=1, max_waiting=1)
    first = await bench.begin("a")
    await until(lambda: bench.loop.stats().running == 1)
    second, third = await bench.begin("b"), await bench.begin("c")
    bench.runner.allow(1_000)
    outcomes = await asyncio.gather(first, second, third, return_exceptions=True)
    assert [text(o) for o in outcomes[:2]] == ["abcde", "abcde"]
    assert isinstance(outcomes[2], Overloaded)
    assert bench.loop.failure is None
    await bench.until_held(0)


async def test_the_first_event_tells_how_long_its_request_waited(
    make: Callable[..., Bench],
) -> None:
    bench = make(max_num_seqs=1)
    first = await bench.begin("a")
    await until(lambda: bench.loop.stats().running == 1)
    second = await bench.begin("b")
    submitted = time.perf_counter()
    bench.runner.allow(1)  # new requests come in between steps
    await bench.until_held(2)
    waited = time.perf_counter() - submitted
    bench.runner.allow(1_000)
    a, b = await asyncio.gather(first, second)
    assert b[0].queue_s > waited
    assert a[0].queue_s > 0
    assert not any(event.queue_s for event in [*a[1:], *b[1:]])


async def test_a_request_that_can_never_fit_is_rejected(make: Callable[..., Bench]) -> None:
    bench = make(free=True)
    with pytest.raises(ContextLengthExceeded):
        async for _ in bench.loop.stream(make_request("a", 5_000)):
            pass
    assert text(await bench.collect("b")) == "abcde"


async def test_a_request_for_too_many_answers_is_rejected(
    make: Callable[..., Bench],
) -> None:
    bench = make(free=True, max_num_seqs=4)
    with pytest.raises(InvalidRequest) as error:
        await bench.collect("a", n=5)
    assert error.value.param == "n"
    assert text(await bench.collect("b", n=4), index=3) == "defgh"


async def test_a_failed_step_fails_all_requests_and_later_ones(
    make: Callable[..., Bench],
) -> None:
    bench = make(max_num_seqs=2)
    tasks = [await bench.begin(f"r{n}", 50) for n in range(4)]
    bench.runner.allow(2)
    await until(lambda: bench.loop.stats().steps == 2)
    bench.runner.fail()
    async with asyncio.timeout(DEADLINE):
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Unavailable] * 4
    assert "the device is gone" in str(outcomes[0])
    assert isinstance(bench.loop.failure, RuntimeError)
    with pytest.raises(Unavailable):
        await bench.collect("later")


async def test_an_answer_finished_before_a_failure_is_delivered(
    make: Callable[..., Bench],
) -> None:
    bench = make()
    cut, whole = await bench.begin("b", 9), await bench.begin("a", 1)
    bench.runner.allow(2)  # the first step may have started before the second request arrived
    block_until(lambda: bench.loop.stats().steps == 2)
    bench.runner.fail()
    block_until(lambda: bench.loop.failure)
    bench.loop.close()
    outcomes = await asyncio.gather(whole, cut, return_exceptions=True)
    assert isinstance(outcomes[1], Unavailable)
    assert not isinstance(outcomes[0], Unavailable)
    assert text(outcomes[0]) == "a"


async def test_a_request_whose_time_is_over_ends_and_is_counted(
    make: Callable[..., Bench],
) -> None:
    steps: list[Step] = []
    bench = make(observe=steps.append)
    staying = await bench.begin("a", 3)
    late = request("b", 400)
    late.expires = time.perf_counter()  # over before a step can be formed
    events = bench.loop.stream(late)
    expiring = asyncio.ensure_future(anext(events))
    await bench.until_held(1)
    bench.runner.allow(3)
    with pytest.raises(TimedOut):
        await expiring
    assert text(await staying) == "abc"
    await until(lambda: len(steps) == 3)
    assert sum(step.expired for step in steps) == 1


async def test_a_step_that_does_not_end_is_noticed(make: Callable[..., Bench]) -> None:
    bench = make()
    assert bench.loop.stalled_s == 0
    task = await bench.begin("a", 3)
    await bench.until_held(1)
    bench.now = 7.0
    assert bench.loop.stalled_s == 7
    assert bench.loop.usual_s == 0
    bench.runner.allow(1)
    await until(lambda: bench.loop.usual_s == 7)
    await until(lambda: bench.loop.stalled_s == 0)  # the second step is under way
    bench.now = 9.0
    assert bench.loop.stalled_s == 2
    bench.runner.allow(2)
    assert text(await task) == "abc"
    await until(lambda: bench.loop._progress._since is None)
    bench.now = 50.0
    assert bench.loop.stalled_s == 0  # idle
    assert bench.loop.usual_s == 7


async def test_a_failing_observer_does_not_stop_the_engine(
    make: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    def observe(_: Step) -> None:
        raise ArithmeticError("not measured")

    bench = make(free=True, observe=observe)
    for name in ("a", "b"):
        assert text(await bench.collect(name)) == "abcde"
    assert bench.loop.failure is None
    logged = [r.exc_info[0] for r in caplog.records if r.exc_info]
    assert logged.count(ArithmeticError) == 1


async def test_closing_fails_current_and_later_streams(
    make: Callable[..., Bench],
) -> None:
    bench = make()
    reading = await bench.begin("a", 900)
    closing = asyncio.create_task(asyncio.to_thread(bench.loop.close))
    await until(lambda: closed(bench, closing))
    for call in (reading, bench.collect("b")):
        with pytest.raises(Unavailable, match="closed"):
            await call


async def test_closing_ends_the_thread(make: Callable[..., Bench]) -> None:
    before = threading.active_count()
    bench = make(free=True)
    assert threading.active_count() == before + 1
    assert text(await bench.collect("a")) == "abcde"
    bench.loop.close()
    assert threading.active_count() == before


def closed(bench: Bench, closing: asyncio.Task[None]) -> bool:
    """Allows one more step, in case the loop is waiting in one; returns whether it has closed."""
    bench.runner.allow(1)
    return closing.done()


async def test_closing_does_not_wait_for_running_answers(make: Callable[..., Bench]) -> None:
    bench = make()
    task = await bench.begin("a", 900)
    closing = asyncio.create_task(asyncio.to_thread(bench.loop.close))
    await until(lambda: closed(bench, closing))
    assert bench.loop.stats().steps < 900
    with pytest.raises(Unavailable):
        await task
