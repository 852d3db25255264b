"""Calls to a stage: who takes them, and what happens when a replica is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from ray.exceptions import ActorUnavailableError, RayTaskError

from blip2_serve.errors import (
    InvalidRequest,
    Quarantined,
    TimedOut,
    Unavailable,
    WrongCheckpoint,
)
from blip2_serve.stages import calls, replicas
from blip2_serve.stages.calls import StageClient, Work, attempt_of
from blip2_serve.stages.router import CallRouter
from blip2_serve.types import Call, Vitals
from support.recorder import FakeRecorder

WORK = Work("content")


def dead() -> Exception:
    return ActorUnavailableError("the actor is unavailable", b"0123456789abcdef")


def raised(error: Exception) -> Exception:
    """What a handle raises if the stage raised `error`."""
    return RayTaskError("method", "traceback", error).as_instanceof_cause()


@dataclass
class Replica:
    """A replica of the fake stage: `answer` returns or raises what a call gets there."""

    name: str
    answer: Callable[[Any], Awaitable[Any]]
    fingerprint: str = ""
    silent: bool = False
    calls: list[Any] = field(default_factory=list)

    async def alive(self) -> Vitals:
        if self.silent:
            await asyncio.Event().wait()
        return Vitals(self.name, 1, 10.0, 7.0, self.fingerprint)


class Response:
    """A fake DeploymentResponse, or generator of them."""

    def __init__(self, stage: Stage, args: tuple[Any, ...], call: Call) -> None:
        self._work = stage.run(args, call)
        self._items: Any = None
        self.cancelled = False

    def __await__(self) -> Any:
        return self._work.__await__()

    def __aiter__(self) -> Response:
        return self

    async def __anext__(self) -> Any:
        if self._items is None:
            self._items = await self._work
        return await anext(self._items)

    def cancel(self) -> None:
        self.cancelled = True


class Stage:
    """A fake DeploymentHandle that routes as Ray Serve does: by the package's own router."""

    def __init__(self, *replicas: Replica) -> None:
        self.replicas = {replica.name: replica for replica in replicas}
        self.leaving: dict[str, Replica] = {}  # they finish their calls, and get no others
        self.responses: list[Response] = []
        self._router = CallRouter.__new__(CallRouter)

    def options(self, **_: Any) -> Stage:
        return self

    def remote(self, *args: Any, call: Call) -> Response:
        self.responses.append(Response(self, args, call))
        return self.responses[-1]

    async def run(self, args: tuple[Any, ...], call: Call) -> Any:
        while not (name := await self._route(call)):
            await asyncio.sleep(0.001)
        replica = self.replicas[name]
        replica.calls.append(args)
        return await replica.answer(*args)

    async def _route(self, call: Call) -> str | None:
        pending: Any = SimpleNamespace(kwargs={"call": call}, routing_context=SimpleNamespace())
        candidates: list[Any] = [
            SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in self.replicas
        ]
        ranks = await self._router.choose_replicas(candidates, pending)
        return ranks[0][0].replica_id.unique_id if ranks else None


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks replicas fifty times as often, of the fake stage."""

    async def broadcast(stage: Stage, method: str, caller: str) -> list[Awaitable[Any]]:
        assert method == "alive"
        assert caller
        return [replica.alive() for replica in [*stage.replicas.values()]]

    async def check_health(stage: Stage, replica: str) -> None:
        if not stage.leaving[replica].silent:
            return
        await asyncio.Event().wait()

    monkeypatch.setattr(replicas, "broadcast", broadcast)
    monkeypatch.setattr(replicas, "check_health", check_health)
    monkeypatch.setattr(calls, "ASK_EVERY_S", 0.02)
    monkeypatch.setattr(replicas, "ASK_EVERY_S", 0.02)
    monkeypatch.setattr(replicas, "QUIET_AFTER_S", 0.03)
    monkeypatch.setattr(replicas, "SILENT_AFTER_S", 0.06)
    monkeypatch.setattr(calls, "JITTER_S", 0.001)


def client_of(stage: Stage, recorder: FakeRecorder | None = None) -> StageClient:
    handle: Any = stage
    return StageClient("generator", handle, recorder or FakeRecorder())


async def echo(*args: Any) -> Any:
    return args


async def test_calls_spread_over_the_replicas() -> None:
    gate = asyncio.Event()

    async def wait(*_: Any) -> None:
        await gate.wait()

    stage = Stage(*(Replica(name, wait) for name in "abc"))
    client = client_of(stage)
    running = [asyncio.create_task(client.call("work", i, work=WORK)) for i in range(9)]
    while sum(len(replica.calls) for replica in stage.replicas.values()) < 9:
        await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*running)

    assert [len(replica.calls) for replica in stage.replicas.values()] == [3, 3, 3]


async def test_a_call_whose_replica_dies_is_made_again_on_another() -> None:
    recorder = FakeRecorder()

    async def die(*_: Any) -> None:
        raise dead()

    stage = Stage(Replica("dying", die))
    client = client_of(stage, recorder)
    assert not client.replicas.is_mending
    running = asyncio.create_task(client.call("work", 1, work=WORK))
    while not stage.replicas["dying"].calls:
        await asyncio.sleep(0)
    stage.replicas["successor"] = Replica("successor", echo)

    assert await running == (1,)
    assert client.replicas.is_mending  # for as long as a replica takes to start
    later = time.monotonic() + replicas.STARTS * replicas.START_S
    with mock.patch.object(client.replicas._loop, "time", return_value=later):
        assert not client.replicas.is_mending
    assert recorder.total("blip2_replays_total", "generator", "died") == 1


async def test_an_ingress_without_a_call_on_a_lost_replica_notes_the_loss_too() -> None:
    stage = Stage(Replica("lost", echo), Replica("other", echo))
    client = client_of(stage)
    await client.call("work", 1, work=WORK)
    assert not client.replicas.is_mending
    del stage.replicas["lost"]
    await client.call("work", 1, work=WORK)
    assert client.replicas.is_mending


async def test_a_dead_replica_gets_no_further_calls_until_it_answers_again() -> None:
    async def die(*_: Any) -> None:
        raise dead()

    dying = Replica("dying", die, silent=True)
    stage = Stage(dying, Replica("healthy", echo))
    client = client_of(stage)
    for i in range(20):
        await client.call("work", i, work=Work(str(i)))
    assert len(dying.calls) <= 1

    dying.answer, dying.silent, dying.calls = echo, False, []
    while not dying.calls:
        await client.call("work", 0, work=WORK)
        await asyncio.sleep(0.005)


async def test_a_silent_replica_loses_its_calls_to_one_that_answers() -> None:
    async def hang(*_: Any) -> None:
        await asyncio.Event().wait()

    stage = Stage(Replica("silent", hang, silent=True))
    client = client_of(stage)
    running = asyncio.create_task(client.call("work", 1, work=WORK))
    while not stage.replicas["silent"].calls:
        await asyncio.sleep(0)
    await asyncio.sleep(0.2)
    assert not running.done(), "there was no other replica, and this one may answer yet"
    stage.replicas["other"] = Replica("other", echo)

    assert await asyncio.wait_for(running, 5) == (1,)
    assert stage.responses[0].cancelled


async def test_a_slow_replica_that_answers_alive_keeps_its_calls() -> None:
    gate = asyncio.Event()

    async def slow(*args: Any) -> Any:
        await gate.wait()
        return args

    stage = Stage(Replica("slow", slow), Replica("other", slow))
    running = asyncio.create_task(client_of(stage).call("work", 1, work=WORK))
    await asyncio.sleep(0.3)
    gate.set()

    assert await running == (1,)
    assert len(stage.responses) == 1


@pytest.mark.parametrize("silent", [False, True])
async def test_a_replica_that_is_to_stop_keeps_its_calls_while_it_is_healthy(silent: bool) -> None:
    gate = asyncio.Event()

    async def slow(*args: Any) -> Any:
        await gate.wait()
        return args

    stage = Stage(Replica("leaving", slow))
    client = client_of(stage)
    running = asyncio.create_task(client.call("work", 1, work=WORK))
    while not stage.replicas["leaving"].calls:
        await asyncio.sleep(0)
    leaving = stage.replicas.pop("leaving")
    leaving.silent = silent
    stage.leaving["leaving"], stage.replicas["other"] = leaving, Replica("other", echo)
    for _ in range(30):
        assert await client.call("work", 2, work=WORK) == (2,)
        await asyncio.sleep(0.01)
    assert running.done() == silent
    gate.set()

    assert await running == (1,)


async def test_what_the_stage_raises_is_the_callers_and_is_not_tried_again() -> None:
    async def refuse(*_: Any) -> None:
        raise raised(InvalidRequest("wrong", "field"))

    stage = Stage(Replica("a", refuse))
    with pytest.raises(InvalidRequest) as error:
        await client_of(stage).call("work", work=WORK)

    assert error.value.param == "field"
    assert len(stage.responses) == 1


async def test_an_engine_that_has_failed_is_a_lost_replica() -> None:
    async def failed(*_: Any) -> None:
        raise raised(Unavailable("the engine has failed"))

    stage = Stage(Replica("failed", failed, silent=True), Replica("healthy", echo))
    client = client_of(stage)
    for _ in range(10):
        assert await client.call("work", 1, work=WORK) == (1,)


async def test_content_that_kills_three_replicas_is_quarantined_and_others_survive() -> None:
    recorder = FakeRecorder()
    stage = Stage()
    born = 0

    def replace() -> None:
        nonlocal born
        born += 1
        name = str(born)

        async def work(content: str) -> str:
            await asyncio.sleep(0.01)
            if content == "killer" or name not in stage.replicas:
                if stage.replicas.pop(name, None):
                    replace()
                raise dead()
            if name not in stage.replicas:
                raise dead()
            return content

        stage.replicas[name] = Replica(name, work)

    replace()
    client = client_of(stage, recorder)
    contents = ["killer", *(f"innocent {i}" for i in range(12))]
    answers = await asyncio.gather(
        *(client.call("work", content, work=Work(content)) for content in contents),
        return_exceptions=True,
    )

    assert isinstance(answers[0], Quarantined)
    assert answers[1:] == contents[1:]
    assert born == 4
    assert recorder.total("blip2_quarantined_total", "generator") == 1
    with pytest.raises(Quarantined):
        await client.call("work", "killer", work=Work("killer"))
    assert born == 4


async def test_content_is_not_to_blame_for_replicas_that_fail_without_dying() -> None:
    async def failed(*_: Any) -> None:
        raise raised(Unavailable("the engine has failed"))

    stage = Stage(*(Replica(name, failed, silent=True) for name in "abc"))
    client = client_of(stage)
    with pytest.raises(Unavailable):
        await client.call("work", work=WORK)
    stage.replicas["healthy"] = Replica("healthy", echo)

    assert await client.call("work", 1, work=WORK) == (1,)


async def test_waiting_for_a_replica_ends_at_the_deadline() -> None:
    deadline = asyncio.get_running_loop().time() + 0.1
    with pytest.raises(Unavailable):
        await client_of(Stage()).call("work", work=Work("content", deadline=deadline))


async def test_a_replica_that_takes_too_long_is_a_timeout() -> None:
    async def hang(*_: Any) -> None:
        await asyncio.Event().wait()

    stage = Stage(Replica("slow", hang))
    deadline = asyncio.get_running_loop().time() + 0.1
    with pytest.raises(TimedOut):
        await client_of(stage).call("work", work=Work("content", deadline=deadline))
    assert stage.responses[0].cancelled


async def test_a_bounded_number_of_calls_waits_for_a_replica(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calls, "MAX_UNPLACED", 4)
    stage = Stage()
    client = client_of(stage)
    running = [asyncio.create_task(client.call("work", i, work=WORK)) for i in range(5)]
    with pytest.raises(Unavailable) as error:
        await running[4]
    assert error.value.retry_after_s == replicas.START_S
    stage.replicas["a"] = Replica("a", echo)

    assert await asyncio.gather(*running[:4]) == [(0,), (1,), (2,), (3,)]


async def test_a_call_whose_time_is_over_before_it_is_placed_is_not_told_that_nobody_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Stage(Replica("a", echo))
    client = client_of(stage)
    await client.call("work", 1, work=WORK)
    while not client.replicas.are_there:
        await asyncio.sleep(0.01)

    async def hang(_: Call) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(stage, "_route", hang)
    deadline = asyncio.get_running_loop().time() + 0.1
    with pytest.raises(TimedOut):
        await client.call("work", work=Work("content", deadline=deadline))


async def test_a_suspect_that_finds_no_place_passes_its_turn_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Stage()
    client = client_of(stage)
    tries = calls._Tries(client, WORK)
    tries._losses = calls.MAX_ATTEMPTS - 1
    attempt = await tries.next()
    monkeypatch.setattr(calls, "MAX_UNPLACED", 0)
    with pytest.raises(Unavailable), attempt:
        pass

    async with asyncio.timeout(5):
        assert (await tries.next()).alone


async def test_the_stage_knows_what_is_left_of_a_calls_time_when_it_gets_it() -> None:
    left: list[float | None] = []
    stage = Stage()
    run = stage.run

    async def heard(args: tuple[Any, ...], call: Call) -> Any:
        answer = await run(args, call)
        attempt = attempt_of(call.id)
        assert attempt
        left.append(attempt.call.seconds_left)
        return answer

    stage.run = heard  # type: ignore[method-assign]
    loop = asyncio.get_running_loop()
    work = Work("content", deadline=loop.time() + 10)
    call = asyncio.create_task(client_of(stage).call("work", 1, work=work))
    await asyncio.sleep(0.1)
    stage.replicas["a"] = Replica("a", echo)
    await call

    assert left[0] is not None
    assert left[0] < 10 - 0.1 - calls.EARLIER_S


async def test_a_call_only_goes_where_its_checkpoint_is() -> None:
    stage = Stage(Replica("old", refuse_checkpoint, "f1"), Replica("new", echo, "f2"))
    client = client_of(stage)
    for _ in range(50):
        assert await client.call("work", 1, work=Work("content", fingerprint="f2")) == (1,)
    await asyncio.sleep(0.1)

    assert client.replicas.serve("f1")
    assert not client.replicas.serve("f3")


async def test_a_call_whose_checkpoint_is_gone_ends_before_its_deadline() -> None:
    stage = Stage(Replica("new", echo, "f2"))
    client = client_of(stage)
    deadline = asyncio.get_running_loop().time() + 60
    work = Work("content", deadline=deadline, fingerprint="f1")
    stage.replicas["new"].answer = refuse_checkpoint
    async with asyncio.timeout(5):
        with pytest.raises(Unavailable) as error:
            await client.call("work", 1, work=work)

    assert "replaced" in str(error.value)
    assert not client.replicas.serve("f1")


async def refuse_checkpoint(*_: Any) -> None:
    raise raised(WrongCheckpoint("another checkpoint"))


async def test_a_stream_goes_on_where_it_was_and_its_pause_is_measured() -> None:
    recorder = FakeRecorder()
    received: list[int] = []

    async def count(begin: int, end: int, failure: Exception | None) -> Any:
        async def numbers() -> AsyncIterator[int]:
            for number in range(begin, end):
                yield number
            if failure:
                raise failure

        return numbers()

    async def first(_: int, begin: int) -> Any:
        return await count(begin, 4, dead())

    async def second(last: int, begin: int) -> Any:
        return await count(begin, last, None)

    stage = Stage(Replica("first", first, silent=True))
    client = client_of(stage, recorder)
    numbers = client.stream("count", 10, resume=lambda: len(received), work=WORK)
    async for number in numbers:
        received.append(number)
        stage.replicas["second"] = Replica("second", second)

    assert received == [*range(10)]
    assert len(recorder.observed["blip2_replay_pause_seconds",]) == 1


async def test_a_stream_that_lost_only_its_end_is_not_asked_for_again() -> None:
    received: list[int] = []

    async def dies_after_the_last(begin: int) -> Any:
        async def numbers() -> AsyncIterator[int]:
            yield begin
            raise dead()

        return numbers()

    stage = Stage(Replica("a", dies_after_the_last))
    numbers = client_of(stage).stream("count", resume=lambda: None if received else 0, work=WORK)
    async with asyncio.timeout(5):
        received.append(await anext(numbers))
        with pytest.raises(StopAsyncIteration):
            await anext(numbers)

    assert received == [0]
    assert len(stage.responses) == 1


async def test_leaving_a_stream_cancels_it() -> None:
    async def endless(begin: int) -> Any:
        async def numbers() -> AsyncIterator[int]:
            while True:
                yield begin

        return numbers()

    stage = Stage(Replica("a", endless))
    numbers = client_of(stage).stream("count", resume=lambda: 0, work=WORK)
    await anext(numbers)
    await numbers.aclose()

    assert stage.responses[0].cancelled


async def test_no_attempt_outlives_its_call() -> None:
    stage = Stage(Replica("a", echo))
    client = client_of(stage)
    await client.call("work", 1, work=WORK)

    assert not calls._attempts
    assert attempt_of("unknown") is None


async def test_the_capacity_is_that_of_all_replicas_shared_by_the_callers() -> None:
    stage = Stage(Replica("a", echo), Replica("b", echo))
    client = client_of(stage)
    assert client.replicas.capacity() is None
    await client.call("work", 1, work=WORK)
    while client.replicas.capacity() is None:
        await asyncio.sleep(0.01)

    assert client.replicas.capacity() == 20.0
    del stage.replicas["b"]
    await client.call("work", 1, work=WORK)
    assert client.replicas.capacity() == 10.0, "a replica that was stopped still counts"


async def test_the_next_call_tells_the_stage_how_many_requests_were_refused() -> None:
    told: list[int] = []
    stage = Stage(Replica("a", echo))
    run = stage.run

    async def heard(args: tuple[Any, ...], call: Call) -> Any:
        told.append(call.refused)
        return await run(args, call)

    stage.run = heard  # type: ignore[method-assign]
    client = client_of(stage)
    for _ in range(3):
        client.refused()
    for _ in range(2):
        await client.call("work", work=WORK)

    assert told == [3, 0]


async def test_a_stage_answers_while_one_of_its_replicas_does() -> None:
    stage = Stage(Replica("silent", echo, silent=True))
    client = client_of(stage)
    assert not await client.replicas.answer()
    stage.replicas["other"] = Replica("other", echo)
    assert await client.replicas.answer()
    stage.replicas.clear()
    await asyncio.sleep(0.05)
    assert not await client.replicas.answer()
