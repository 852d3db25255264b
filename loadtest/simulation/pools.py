"""Replicas that serve requests, and the pool of a stage's replicas.

A pool routes as Serve does: to the less busy of two random replicas, or into a queue at the callers
while every replica is full.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush

from blip2_serve.observe.meter import BatchMeter, EngineMeter
from blip2_serve.scaling import Signals
from loadtest.simulation.events import Events
from loadtest.simulation.profile import MAX_ONGOING, EngineProfile, PoolProfile, StageProfile

NOISE = 0.1  # at most, up or down, as a share of the measured seconds


@dataclass(slots=True, eq=False)
class Request:
    arrived: float
    work: float  # decoding time relative to the mean
    answer_tokens: int


Finished = Callable[["Replica", Request], None]


class Replica(ABC):
    """Serves the requests it accepts, and calls `finished` for each."""

    def __init__(self, events: Events, rng: random.Random, finished: Finished) -> None:
        self.ongoing = 0
        self.samples: deque[Signals] = deque()  # for the controller
        self._events = events
        self._rng = rng
        self._finished = finished

    @abstractmethod
    def accept(self, request: Request) -> None: ...

    @abstractmethod
    def signals(self) -> Signals: ...

    def _noise(self) -> float:
        return 1 + NOISE * (2 * self._rng.random() - 1)


class BatchReplica(Replica):
    """Preprocessor and encoder: each free thread takes the waiting items, up to the limit."""

    def __init__(
        self, profile: PoolProfile, events: Events, rng: random.Random, finished: Finished
    ) -> None:
        super().__init__(events, rng, finished)
        self._profile = profile
        self._free = profile.threads
        self._waiting: deque[Request] = deque()
        self._meter = BatchMeter(
            profile.limit, profile.threads, lambda: events.now, lambda: profile.start_s
        )
        self._meter.ready()

    def accept(self, request: Request) -> None:
        self._waiting.append(request)
        if self._free:
            self._start()

    def signals(self) -> Signals:
        return self._meter.signals(len(self._waiting))

    def _start(self) -> None:
        waiting = self._waiting
        batch = [waiting.popleft() for _ in range(min(len(waiting), self._profile.limit))]
        seconds = self._profile.batch_s[len(batch)]
        if self._profile.varies:
            seconds *= sum(request.work for request in batch) / len(batch)
        self._free -= 1
        self._events.after(seconds, self._done, (batch, seconds))

    def _done(self, done: tuple[list[Request], float]) -> None:
        batch, seconds = done
        self._meter.computed(len(batch), seconds * self._noise())
        self._free += 1
        if self._waiting:
            self._start()
        for request in batch:
            self._finished(self, request)


class EngineReplica(Replica):
    """Generator: each step adds a token to all running sequences; prompts delay them.

    `_clock` counts steps. A sequence ends once the clock has advanced by its tokens, however long
    the steps took, so only beginnings and ends are events.
    """

    def __init__(
        self, profile: EngineProfile, events: Events, rng: random.Random, finished: Finished
    ) -> None:
        super().__init__(events, rng, finished)
        self._profile = profile
        self._waiting: deque[Request] = deque()
        self._running: list[tuple[float, int, Request]] = []  # heap by the clock at the end
        self._clock = self._updated = self._prompts_until = 0.0
        self._admitted = self._plan = 0
        self._meter = EngineMeter(profile.max_num_seqs, lambda: events.now, lambda: profile.start_s)
        self._meter.ready()

    def accept(self, request: Request) -> None:
        self._meter.arrived()
        self._waiting.append(request)
        if len(self._running) < self._profile.places:
            self._go_on()

    def signals(self) -> Signals:
        running = len(self._running)
        kv_share = running * self._profile.reach / self._profile.kv_slots
        return self._meter.signals(running, len(self._waiting), kv_share)

    def _go_on(self) -> None:
        """Advances the clock, ends and admits requests, plans the next end."""
        profile, running, now = self._profile, self._running, self._events.now
        begin = max(self._updated, self._prompts_until)
        if running and now > begin:
            step_s = profile.step_s[len(running)]
            steps = (now - begin) / step_s
            self._clock += steps
            self._meter.stepped(len(running), step_s * self._noise(), steps)
        self._updated = now
        ended = []
        while running and running[0][0] <= self._clock + 1e-9:
            ended.append(heappop(running)[2])
        while self._waiting and len(running) < profile.places:
            request = self._waiting.popleft()
            self._prompts_until = max(now, self._prompts_until) + profile.prompt_s
            prompt_step_s = profile.prompt_s + profile.step_s[0]
            self._meter.stepped(profile.prompt_tokens, prompt_step_s * self._noise())
            self._admitted += 1
            heappush(running, (self._clock + request.answer_tokens, self._admitted, request))
        self._plan += 1
        if running:
            steps = running[0][0] - self._clock
            seconds = max(0.0, self._prompts_until - now) + steps * profile.step_s[len(running)]
            self._events.after(seconds, self._planned, self._plan)
        for request in ended:
            self._meter.left(request.answer_tokens)
            self._finished(self, request)

    def _planned(self, plan: int) -> None:
        if plan == self._plan:  # nothing has changed since
            self._go_on()


class Pool:
    """The replicas of one stage: routing, starting, draining, replica-seconds."""

    def __init__(
        self,
        name: str,
        profile: StageProfile,
        events: Events,
        rng: random.Random,
        pass_on: Callable[[Request], None],
    ) -> None:
        self.name = name
        self.profile = profile
        self.replicas: list[Replica] = []  # neither starting nor draining
        self.target = 0
        self.ongoing = 0  # requests, including those at callers
        self.queue: deque[Request] = deque()  # at callers
        self.changes: list[tuple[float, int]] = []  # of the target
        self.passed = 0  # requests
        self._events = events
        self._rng = rng
        self._pass_on = pass_on
        self._starting: list[object] = []
        self._draining: set[Replica] = set()
        self._room = 0  # requests that the replicas can still take
        self._replica_s = self._counted_at = 0.0

    @property
    def alive(self) -> int:
        """Replicas that hold their resources."""
        return len(self.replicas) + len(self._starting) + len(self._draining)

    def replica_seconds(self) -> float:
        """The total so far."""
        now = self._events.now
        self._replica_s += self.alive * (now - self._counted_at)
        self._counted_at = now
        return self._replica_s

    def submit(self, request: Request) -> None:
        self.ongoing += 1
        if self._room:
            self._give(self._choose(), request)
        else:
            self.queue.append(request)

    def set_target(self, target: int, at_once: bool = False) -> None:
        """Starts or stops replicas; like Serve, it first stops those that are starting."""
        if target == self.target:
            return
        self.replica_seconds()
        self.target = target
        self.changes.append((self._events.now, target))
        while len(self.replicas) + len(self._starting) < target:
            start = object()
            self._starting.append(start)
            if at_once:
                self._ready(start)
            else:
                self._events.after(self.profile.start_s, self._ready, start)
        while self._starting and len(self.replicas) + len(self._starting) > target:
            self._starting.pop()
        while len(self.replicas) > target:
            self._stop(self.replicas.pop())

    def _ready(self, start: object) -> None:
        if start not in self._starting:  # stopped before it was ready
            return
        self._starting.remove(start)
        kind = EngineReplica if isinstance(self.profile, EngineProfile) else BatchReplica
        replica = kind(self.profile, self._events, self._rng, self._done)  # type: ignore[arg-type]
        self.replicas.append(replica)
        self._room += MAX_ONGOING
        while self.queue and replica.ongoing < MAX_ONGOING:
            self._give(replica, self.queue.popleft())

    def _stop(self, replica: Replica) -> None:
        self._room -= MAX_ONGOING - replica.ongoing
        if replica.ongoing:
            self._draining.add(replica)

    def _choose(self) -> Replica:
        replicas, random_number = self.replicas, self._rng.random
        one = replicas[int(random_number() * len(replicas))]
        other = replicas[int(random_number() * len(replicas))]
        chosen = one if one.ongoing <= other.ongoing else other
        if chosen.ongoing < MAX_ONGOING:
            return chosen
        return min(replicas, key=lambda replica: replica.ongoing)

    def _give(self, replica: Replica, request: Request) -> None:
        replica.ongoing += 1
        self._room -= 1
        replica.accept(request)

    def _done(self, replica: Replica, request: Request) -> None:
        self.ongoing -= 1
        replica.ongoing -= 1
        self.passed += 1
        if replica in self._draining:
            if not replica.ongoing:
                self.replica_seconds()
                self._draining.remove(replica)
        else:
            self._room += 1
            if self.queue:
                self._give(replica, self.queue.popleft())
        self._pass_on(request)
