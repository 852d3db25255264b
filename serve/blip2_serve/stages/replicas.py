"""What an ingress replica knows of the replicas of one stage, which it asks now and then.

A lost replica is suspect until it answers `alive` again. One that is to stop once its calls are
done is no longer known to Ray Serve's handles, so it is asked by its health check.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import uuid
from collections.abc import Awaitable, Collection, Sequence
from typing import Any, TypeVar

from ray.serve.handle import DeploymentHandle

from blip2_serve.serve_internals import broadcast, check_health
from blip2_serve.types import Vitals

T = TypeVar("T")

ASK_EVERY_S = 1.0
QUIET_AFTER_S = 1.5
SILENT_AFTER_S = 3.0
FORGET_AFTER_S = 60.0  # replicas that neither work nor answer
START_S = 30.0  # how long a replica takes to start, until one has told
STARTS = 3  # how many times longer that may take while others start beside it


class Replicas:
    """The replicas of one stage, by their unique ids. Make it and use it on one event loop."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._id = uuid.uuid4().hex
        self._loop = asyncio.get_running_loop()
        self._vitals: dict[str, Vitals] = {}
        self._heard: dict[str, float] = {}  # when one answered, or began to work
        self._suspects: set[str] = set()
        self._present: frozenset[str] = frozenset()  # that may get calls, as of the latest one
        self._mending_until = -math.inf

    # -- what is known ---------------------------------------------------------------------------

    def capacity(self) -> float | None:
        """This ingress replica's share of what the stage can do; None while no replica has told.

        In requests (or images) per second.
        """
        known = self._known()
        told = [v.capacity for v in known if v.capacity]
        return len(known) * sum(told) / len(told) / self.callers if told else None

    @property
    def callers(self) -> int:
        """How many ingress replicas call this stage; 0 while no replica has told."""
        return max((vitals.callers for vitals in self._known()), default=0)

    @property
    def start_s(self) -> float:
        """How many seconds a replica takes to start."""
        return max((v.start_s for v in self._vitals.values() if v.start_s), default=START_S)

    @property
    def is_mending(self) -> bool:
        """Whether one has just been lost, so that another one starts, and slows down the others."""
        return self._loop.time() < self._mending_until

    @property
    def suspects(self) -> int:
        """How many have been lost and have not answered since."""
        return len(self._suspects)

    @property
    def are_there(self) -> bool:
        """Whether one has answered and is not lost."""
        return any(replica not in self._suspects for replica in self._vitals)

    def serve(self, fingerprint: str) -> bool:
        """Whether some replica may hold the checkpoint."""
        known = [vitals.fingerprint for vitals in self._known()]
        return not known or fingerprint in known

    def usable(self, present: Sequence[str], fingerprint: str) -> list[str]:
        """Which of the replicas that are there can take a call that needs the checkpoint."""
        before, self._present = self._present, frozenset(present)
        if before - self._present:  # whoever it was that lost one
            self._mend()
        return [r for r in present if r not in self._suspects and self._holds(r, fingerprint)]

    def all_hold_another(self, fingerprint: str) -> bool:
        """Whether replicas are there, but none of them can hold the checkpoint."""
        return bool(self._present) and not any(self._holds(r, fingerprint) for r in self._present)

    def _known(self) -> list[Vitals]:
        """The vitals of the replicas that may get calls."""
        usable = self._present - self._suspects
        return [vitals for replica, vitals in self._vitals.items() if replica in usable]

    def _holds(self, replica: str, fingerprint: str) -> bool:
        vitals = self._vitals.get(replica)
        return not fingerprint or vitals is None or vitals.fingerprint in ("", fingerprint)

    # -- what happens ----------------------------------------------------------------------------

    def begins(self, replica: str) -> None:
        """A replica begins to work; from now on it should answer."""
        self._heard[replica] = self._loop.time()

    def lose(self, replica: str) -> None:
        """A replica has been lost."""
        self._suspects.add(replica)
        self._mend()

    def _mend(self) -> None:
        self._mending_until = self._loop.time() + STARTS * self.start_s

    def excuse(self, busy: Collection[str]) -> None:
        """Forgives the busy ones their silence: it was this process that did not listen."""
        for replica in busy:
            self._heard[replica] = self._loop.time()

    def silent(self, busy: Collection[str]) -> list[str]:
        """Makes silent ones suspect; returns the busy ones among them that others can relieve."""
        now = self._loop.time()
        found = []
        for replica, heard in [*self._heard.items()]:
            if replica in busy and now - heard > SILENT_AFTER_S:
                self.lose(replica)
                found.append(replica)
            elif replica not in busy and now - heard > FORGET_AFTER_S:
                del self._heard[replica]
                self._vitals.pop(replica, None)
                self._suspects.discard(replica)
        others = any(now - heard <= SILENT_AFTER_S for heard in self._heard.values())
        return found if others else []

    # -- asking ----------------------------------------------------------------------------------

    async def answer(self) -> bool:
        """Whether any replica answers, by a question not older than a second or asked now."""
        now = self._loop.time()
        if not any(now - heard <= ASK_EVERY_S for heard in self._heard.values()):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ASK_EVERY_S):
                    await self.ask(())
        return any(heard >= now - ASK_EVERY_S for heard in self._heard.values())

    async def doing(self) -> tuple[int, float] | None:
        """How many requests wait in the replicas, and what they do per second.

        None if none of them answers soon.
        """
        answers = await broadcast(self._handle, "stats")
        results = await asyncio.gather(*map(_soon, answers))
        told = [stats for stats in results if stats is not None]
        if not told:
            return None
        return sum(stats["waiting"] for stats in told), sum(stats["per_s"] for stats in told)

    async def ask(self, busy: Collection[str]) -> None:
        """Asks every replica for its vitals; busy ones that are to stop, for their health."""
        answers = await broadcast(self._handle, "alive", self._id)
        now = self._loop.time()
        async with asyncio.TaskGroup() as group:
            for answer in answers:
                group.create_task(self._hear(answer))
            for replica in busy:
                if now - self._heard.get(replica, now) > QUIET_AFTER_S:
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
        try:
            async with asyncio.timeout(SILENT_AFTER_S):
                await check_health(self._handle, replica)
        except Exception:  # as above
            return
        self._heard[replica] = self._loop.time()


async def _soon(answer: Awaitable[T]) -> T | None:
    try:
        async with asyncio.timeout(ASK_EVERY_S):
            return await answer
    except Exception:  # as above
        return None
