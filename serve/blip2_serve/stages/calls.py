"""The ingress's way to a stage: which replica takes a call, and what if that replica is lost.

A call is made of attempts. An attempt whose replica dies or falls silent is followed by another one
elsewhere, and the client notices nothing but a pause. This file decides; the `CallRouter` in the
same process makes Ray Serve obey.

A lost replica is suspect until it answers `alive` again. While calls are under way, each replica of
the stage is asked once per second. One that is to stop once its calls are done is asked by its
health check.
"""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from blip2_serve.errors import Blip2ServeError, Overloaded, TimedOut, Unavailable, WrongCheckpoint
from blip2_serve.observe import metrics
from blip2_serve.observe.metrics import Recorder
from blip2_serve.serve_internals import broadcast, check_health
from blip2_serve.stages.quarantine import Quarantine
from blip2_serve.types import Call, Vitals

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_ATTEMPTS = 3
JITTER_S = 0.1  # the longest wait before the next attempt
ASK_EVERY_S = 1.0
QUIET_AFTER_S = 1.5
SILENT_AFTER_S = 3.0
FORGET_AFTER_S = 60.0  # replicas that neither work nor answer
MAX_UNPLACED = 256  # calls that wait for a replica
START_S = 30.0  # how long a replica takes to start, until one has told
EARLIER_S = 0.02  # how long before its deadline a call gives up, so that its error says why

REPLACED = "replaced"  # the checkpoint that a call needs

_attempts: dict[str, Attempt] = {}  # under way in this process, by the id of their `Call`


def attempt_of(call_id: str) -> Attempt | None:
    """The attempt that made a call, if it is under way in this process."""
    return _attempts.get(call_id)


def calls_under_way() -> int:
    """How many calls to stages this process waits for."""
    return len(_attempts)


class ReplicaLost(Exception):
    """The replica that worked on an attempt was lost; `cause` says how, in one word."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


@dataclass(frozen=True)
class Work:
    """What an ingress knows of a call.

    Attributes:
        key: Identifies its content, which is quarantined if it kills replicas.
        size: Expected work, in any unit: of the suspects, the smallest goes first.
        deadline: When the request must have ended, by the event loop's clock; None: whenever.
        fingerprint: Of the checkpoint that its replica must hold; empty: any.
    """

    key: str
    size: float = 0.0
    deadline: float | None = None
    fingerprint: str = ""


class StageClient:
    """Calls one stage. Make it and use it on one event loop."""

    def __init__(self, stage: str, handle: DeploymentHandle[Any], recorder: Recorder) -> None:
        self.stage = stage
        self._recorder = recorder
        self._handle = handle
        self._methods: dict[tuple[str, bool], Any] = {}
        self._id = uuid.uuid4().hex
        self._loop = asyncio.get_running_loop()
        self._placed: defaultdict[str, set[Attempt]] = defaultdict(set)  # by replica
        self._unplaced: set[Attempt] = set()
        self._vitals: dict[str, Vitals] = {}
        self._heard: dict[str, float] = {}  # when a replica answered, or first got work
        self._suspects: set[str] = set()
        self._present: frozenset[str] = frozenset()  # that may get calls, as of the latest one
        self._refused = 0  # since the last call
        self._quarantine = Quarantine(self._loop.time)
        self._watching: asyncio.Task[None] | None = None
        self._asking: set[asyncio.Task[None]] = set()

    async def call(self, method: str, *args: Any, work: Work) -> Any:
        """Returns the result of a method; runs it again elsewhere if its replica is lost.

        Raises:
            Blip2ServeError: the method's own; TimedOut, Unavailable, or the content is quarantined.
        """
        remote = self._method(method, stream=False)
        tries = _Tries(self, work)
        while True:
            with await tries.next() as attempt:
                response = remote.remote(*args, call=attempt.call)
                try:
                    return await attempt.wait(response)
                except BaseException:
                    response.cancel()  # Ray Serve does so only if the client has left
                    raise

    async def stream(
        self, method: str, *args: Any, resume: Callable[[], Any], work: Work
    ) -> AsyncGenerator[Any, None]:
        """Yields what a method yields. Leaving early cancels it.

        `resume` returns the last argument of each attempt: where to begin. Raises as `call`.
        """
        remote = self._method(method, stream=True)
        tries = _Tries(self, work)
        while True:
            with await tries.next() as attempt:
                items = remote.remote(*args, resume(), call=attempt.call)
                finished = False
                try:
                    while True:
                        try:
                            item = await attempt.wait(anext(items))
                        except StopAsyncIteration:
                            finished = True
                            return
                        tries.progressed()
                        yield item
                finally:
                    if not finished:
                        items.cancel()

    def capacity(self) -> float | None:
        """This ingress replica's share of what the stage can do; None while no replica has told.

        In requests (or images) per second.
        """
        known = self._known()
        told = [v.capacity for v in known if v.capacity]
        return len(known) * sum(told) / len(told) / max(v.callers for v in known) if told else None

    @property
    def suspects(self) -> int:
        """How many replicas have been lost and have not answered since."""
        return len(self._suspects)

    def refused(self) -> None:
        """Counts a request that could not be admitted; the next call tells the stage."""
        self._refused += 1

    def take_refused(self) -> int:
        refused, self._refused = self._refused, 0
        return refused

    def serves(self, fingerprint: str) -> bool:
        """Whether some replica may hold the checkpoint."""
        known = [vitals.fingerprint for vitals in self._known()]
        return not known or fingerprint in known

    def _known(self) -> list[Vitals]:
        """The vitals of the replicas that may get calls."""
        usable = self._present - self._suspects
        return [vitals for replica, vitals in self._vitals.items() if replica in usable]

    def _method(self, name: str, *, stream: bool) -> Any:
        """The handle of a method. All arguments and results are plain: pickle is enough.

        Kept, since making one costs as much as a small call.
        """
        kept = self._methods.get((name, stream))
        if kept is None:
            kept = self._methods[name, stream] = self._handle.options(
                method_name=name,
                stream=stream,
                request_serialization="pickle",
                response_serialization="pickle",
            )
        return kept

    # -- placing attempts ------------------------------------------------------------------------

    def open(self, attempt: Attempt) -> None:
        """Begins an attempt.

        Raises:
            Unavailable: too many wait for a replica already.
        """
        if len(self._unplaced) >= MAX_UNPLACED:
            starts = [v.start_s for v in self._vitals.values() if v.start_s]
            raise Unavailable(
                f"no replica of the {self.stage} is there; try again later",
                retry_after_s=max(starts, default=START_S),
            )
        self._unplaced.add(attempt)
        _attempts[attempt.call.id] = attempt
        if self._watching is None or self._watching.done():
            self._watching = self._loop.create_task(self._watch())

    def close(self, attempt: Attempt) -> None:
        del _attempts[attempt.call.id]
        self._unplaced.discard(attempt)
        if attempt.replica:
            self._placed[attempt.replica].discard(attempt)

    def place(self, attempt: Attempt, replicas: Sequence[str]) -> str | None:
        """Chooses the least loaded of the replicas for an attempt; None: it has to wait."""
        self._present = frozenset(replicas)
        usable = [r for r in replicas if r not in self._suspects and self._holds(r, attempt)]
        usable = self._quarantine.allowed(usable, alone=attempt.alone)
        if not usable:
            return None
        random.shuffle(usable)
        chosen = min(usable, key=lambda replica: len(self._placed[replica]))
        if attempt.replica:
            self._placed[attempt.replica].discard(attempt)
        self._unplaced.discard(attempt)
        if not self._placed[chosen]:
            self._heard[chosen] = self._loop.time()
        self._placed[chosen].add(attempt)
        return chosen

    def _holds(self, replica: str, attempt: Attempt) -> bool:
        asked, vitals = attempt.work.fingerprint, self._vitals.get(replica)
        return not asked or vitals is None or vitals.fingerprint in ("", asked)

    def _is_replaced(self, attempt: Attempt) -> bool:
        """Whether replicas are there, and all hold another checkpoint than the attempt needs."""
        return bool(self._present) and not any(self._holds(r, attempt) for r in self._present)

    # -- watching replicas -----------------------------------------------------------------------

    def suspect(self, replica: str) -> None:
        self._suspects.add(replica)

    async def _watch(self) -> None:
        """Runs while calls are under way, and asks once after the last of them."""
        busy = True
        while busy:
            busy = bool(self._unplaced) or any(self._placed.values())
            began = self._loop.time()
            await asyncio.sleep(ASK_EVERY_S)
            late = self._loop.time() - began > 2 * ASK_EVERY_S  # it is this process that stalled
            self._judge(excused=late)
            for attempt in filter(self._is_replaced, [*self._unplaced]):
                attempt.lose(REPLACED)
            task = self._loop.create_task(self._ask())
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    async def answers(self) -> bool:
        """Whether any replica answers, by a question not older than a second or asked now."""
        now = self._loop.time()
        if not any(now - heard <= ASK_EVERY_S for heard in self._heard.values()):
            await self._ask()
        return any(heard >= now - ASK_EVERY_S for heard in self._heard.values())

    async def _ask(self) -> None:
        """Asks every replica for its vitals."""
        answers = await broadcast(self._handle, "alive", self._id)
        now = self._loop.time()
        quiet = [r for r, heard in self._heard.items() if now - heard > QUIET_AFTER_S]
        async with asyncio.TaskGroup() as group:
            for answer in answers:
                group.create_task(self._hear(answer))
            for replica in quiet:
                if self._placed[replica]:
                    group.create_task(self._check(replica))

    async def _hear(self, answer: Awaitable[Vitals]) -> None:
        try:
            async with asyncio.timeout(SILENT_AFTER_S):
                vitals = await answer
        except Exception:  # it is starting, ending, broken or silent
            return
        self._vitals[vitals.replica] = vitals
        self._heard[vitals.replica] = self._loop.time()
        self._suspects.discard(vitals.replica)

    async def _check(self, replica: str) -> None:
        """Asks a replica that no longer gets calls how it is doing."""
        try:
            async with asyncio.timeout(SILENT_AFTER_S):
                await check_health(self._handle, replica)
        except Exception:  # as above
            return
        self._heard[replica] = self._loop.time()

    def _judge(self, *, excused: bool) -> None:
        """Takes the attempts from silent replicas, if another one can take them."""
        now = self._loop.time()
        for replica, heard in [*self._heard.items()]:
            silent = now - heard
            if excused and self._placed[replica]:
                self._heard[replica] = now
            elif silent > FORGET_AFTER_S and not self._placed[replica]:
                for known in (self._heard, self._vitals, self._placed):
                    known.pop(replica, None)
                self._suspects.discard(replica)
            elif silent > SILENT_AFTER_S and self._placed[replica]:
                self._suspects.add(replica)
                if any(now - h <= SILENT_AFTER_S for h in self._heard.values()):
                    for attempt in [*self._placed[replica]]:
                        attempt.lose("silent")


class _Tries:
    """The attempts of one call."""

    def __init__(self, client: StageClient, work: Work) -> None:
        self._client = client
        self._work = work
        self._losses = 0
        self._deaths = 0
        self._lost_at: float | None = None

    async def next(self) -> Attempt:
        """The next attempt; waits a little before all but the first.

        Raises:
            Quarantined: the content has killed replicas.
        """
        quarantine = self._client._quarantine
        quarantine.check(self._work.key)
        if self._lost_at is not None:
            await asyncio.sleep(random.uniform(0, JITTER_S))  # noqa: S311 (no secret)
        alone = self._losses == MAX_ATTEMPTS - 1
        if alone:
            await quarantine.turn(self._work.size)
        return Attempt(self._client, self, self._work, alone=alone)

    def lost(self, attempt: Attempt, cause: str) -> None:
        """Notes that an attempt lost its replica.

        Raises:
            Blip2ServeError: there will not be another one.
        """
        client = self._client
        if cause == REPLACED:
            raise Unavailable(
                "the checkpoint has been replaced meanwhile; try again", retry_after_s=1.0
            )
        client._recorder.add(metrics.REPLAYS, stage=client.stage, cause=cause)
        self._lost_at = self._lost_at or client._loop.time()
        if cause == "checkpoint":  # nothing was lost: it was the wrong replica
            return
        if attempt.replica:
            client.suspect(attempt.replica)
        self._losses += 1
        self._deaths += cause == "died"
        if self._losses < MAX_ATTEMPTS:
            return
        if self._deaths < MAX_ATTEMPTS:
            raise Unavailable(f"{MAX_ATTEMPTS} replicas of the {client.stage} were lost; try again")
        client._recorder.add(metrics.QUARANTINED, stage=client.stage)
        logger.error("quarantined: replicas of the %s died while they worked on it", client.stage)
        raise client._quarantine.put(self._work.key)

    def progressed(self) -> None:
        """Notes that an attempt yields."""
        if self._lost_at is not None:
            pause = self._client._loop.time() - self._lost_at
            self._client._recorder.observe(metrics.STREAM_PAUSE, pause)
            self._lost_at = None


class Attempt:
    """One attempt of a call, as a context manager that swallows the loss of its replica."""

    def __init__(self, client: StageClient, tries: _Tries, work: Work, *, alone: bool) -> None:
        self.work = work
        self.call = Call(uuid.uuid4().hex, self._seconds_left(), client.take_refused())
        self.alone = alone
        self.replica: str | None = None  # which has it, as soon as one was chosen
        self._client = client
        self._tries = tries
        self._cause = ""
        self._scope: asyncio.Timeout | None = None

    def __enter__(self) -> Self:
        try:
            self._client.open(self)
        except BaseException:
            if self.alone:
                self._client._quarantine.done()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        self._client.close(self)
        if self.alone:
            self._client._quarantine.done()
        if isinstance(error, ReplicaLost):
            self._tries.lost(self, error.cause)
            return True
        return False

    def choose(self, replicas: Sequence[str]) -> str | None:
        """Called by the router: which of the replicas takes the call; None: none of them."""
        chosen = self._client.place(self, replicas)
        self.replica = chosen or self.replica
        self.call = replace(self.call, seconds_left=self._seconds_left())  # it may have waited
        return chosen

    def _seconds_left(self) -> float | None:
        """The stage's time: it should find that it is over before the call is given up here."""
        if self.work.deadline is None:
            return None
        return self.work.deadline - 2 * EARLIER_S - asyncio.get_running_loop().time()

    def lose(self, cause: str) -> None:
        """Ends the attempt: its replica is lost."""
        self._cause = cause
        if self._scope:
            self._scope.reschedule(asyncio.get_running_loop().time())

    async def wait(self, result: Awaitable[T]) -> T:
        """Awaits what the replica answers.

        Raises:
            ReplicaLost: the replica is lost.
            Blip2ServeError: the stage's own; TimedOut or Unavailable at the deadline.
        """
        deadline = self.work.deadline
        limit = None if deadline is None else deadline - EARLIER_S
        try:
            async with asyncio.timeout_at(limit) as self._scope:
                if self._cause:
                    raise ReplicaLost(self._cause)
                return await result
        except TimeoutError:
            if self._scope is None or not self._scope.expired():  # the stage's own
                raise
            raise self._interrupted() from None
        except RayTaskError as error:
            raise _own(error) from None
        except (RayActorError, RequestCancelledError, grpc.aio.AioRpcError) as error:
            raise ReplicaLost("died") from error
        except DeploymentUnavailableError as error:
            raise Unavailable(f"the {self._client.stage} could not be deployed") from error
        finally:
            self._scope = None

    def _interrupted(self) -> Exception:
        if self._cause:
            return ReplicaLost(self._cause)
        if self.replica is None:
            return Unavailable(f"no replica of the {self._client.stage} was there in time")
        return TimedOut("the answer took longer than the request or this server allows")


def _own(error: RayTaskError) -> Exception:
    """What a stage raised; that it cannot work is a loss of the replica."""
    cause = error.cause
    if isinstance(cause, WrongCheckpoint):
        return ReplicaLost("checkpoint")
    if isinstance(cause, Unavailable) and not isinstance(cause, Overloaded):
        return ReplicaLost("failed")
    return cause if isinstance(cause, Blip2ServeError) else error
