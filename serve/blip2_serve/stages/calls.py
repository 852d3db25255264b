"""The ingress's way to a stage: which replica takes a call, and what if that replica is lost.

A call is made of attempts. An attempt whose replica dies or falls silent is followed by another one
elsewhere, and the client notices nothing but a pause. This file decides; the `CallRouter` in the
same process makes Ray Serve obey.

While calls are under way, the replicas of the stage are asked once per second how they are.
"""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
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
from blip2_serve.serve_internals import own_internal_id
from blip2_serve.stages.quarantine import Quarantine
from blip2_serve.stages.replicas import ASK_EVERY_S, Replicas
from blip2_serve.types import Call

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_ATTEMPTS = 3
JITTER_S = 0.1  # the longest wait before the next attempt
MAX_UNPLACED = 256  # calls that wait for a replica
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
        self.replicas = Replicas(handle)
        self._recorder = recorder
        self._handle = handle
        self._methods: dict[tuple[str, bool], Any] = {}
        self._loop = asyncio.get_running_loop()
        self._placed: dict[str, set[Attempt]] = {}  # by replica; those without any are left out
        self._unplaced: set[Attempt] = set()
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
                with own_internal_id():
                    response = remote.remote(*args, call=attempt.call)
                try:
                    return await attempt.wait(response)
                except BaseException:
                    response.cancel()
                    raise

    async def stream(
        self, method: str, *args: Any, resume: Callable[[], Any], work: Work
    ) -> AsyncGenerator[Any, None]:
        """Yields what a method yields. Leaving early cancels it.

        `resume` returns the last argument of each attempt: where to begin; None: all is there.
        Raises as `call`.
        """
        remote = self._method(method, stream=True)
        tries = _Tries(self, work)
        while (begin := resume()) is not None:
            with await tries.next() as attempt:
                with own_internal_id():
                    items = remote.remote(*args, begin, call=attempt.call)
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

    def refused(self) -> None:
        """Counts a request that could not be admitted; the next call tells the stage."""
        self._refused += 1

    def take_refused(self) -> int:
        refused, self._refused = self._refused, 0
        return refused

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
            raise Unavailable(
                f"no replica of the {self.stage} is there; try again later",
                retry_after_s=self.replicas.start_s,
            )
        self._unplaced.add(attempt)
        _attempts[attempt.call.id] = attempt
        if self._watching is None or self._watching.done():
            self._watching = self._loop.create_task(self._watch())

    def close(self, attempt: Attempt) -> None:
        del _attempts[attempt.call.id]
        self._withdraw(attempt)

    def place(self, attempt: Attempt, present: Sequence[str]) -> str | None:
        """Chooses the least loaded of the replicas for an attempt; None: it has to wait."""
        usable = self.replicas.usable(present, attempt.work.fingerprint)
        usable = self._quarantine.allowed(usable, alone=attempt.alone)
        if not usable:
            return None
        random.shuffle(usable)
        chosen = min(usable, key=lambda replica: len(self._placed.get(replica, ())))
        self._withdraw(attempt)
        if chosen not in self._placed:
            self.replicas.begins(chosen)
        self._placed.setdefault(chosen, set()).add(attempt)
        return chosen

    def _withdraw(self, attempt: Attempt) -> None:
        self._unplaced.discard(attempt)
        if attempt.replica and (there := self._placed.get(attempt.replica)):
            there.discard(attempt)
            if not there:
                del self._placed[attempt.replica]

    async def _watch(self) -> None:
        """Runs while calls are under way, and asks once after the last of them."""
        busy = True
        while busy:
            busy = bool(self._unplaced or self._placed)
            began = self._loop.time()
            await asyncio.sleep(ASK_EVERY_S)
            if self._loop.time() - began > 2 * ASK_EVERY_S:
                self.replicas.excuse(self._placed)
            for replica in self.replicas.silent(self._placed):
                for attempt in [*self._placed[replica]]:
                    attempt.lose("silent")
            for attempt in [*self._unplaced]:
                if self.replicas.all_hold_another(attempt.work.fingerprint):
                    attempt.lose(REPLACED)
            task = self._loop.create_task(self.replicas.ask([*self._placed]))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)


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
            client.replicas.lose(attempt.replica)
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
        if self.replica is None and not self._client.replicas.are_there:
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
