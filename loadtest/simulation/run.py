"""One trace through the three stages, scaled by one policy: how late, at what cost."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from blip2_serve.scaling import Stage
from simulation.controller import Controller, serve_config, time_of
from simulation.events import Events
from simulation.profile import EngineProfile, PoolProfile, Profile
from simulation.stages import Pool, Request
from simulation.traces import WARM_UP_S, Trace

STAGES = ("preprocessor", "encoder", "generator")
WINDOW_S = 5.0  # requests that arrive within it are judged together
LATE_SHARE = 0.05  # of a window's requests; above it, the SLO is missed


@dataclass(frozen=True)
class Outcome:
    """Of the time after the warm-up."""

    requests: int
    late_share: float  # requests that took longer than the SLO
    missed_s: float  # in windows that missed it: the time to recover, for a step
    replica_hours: dict[str, float]
    cost_hours: float  # replica-hours by what each costs
    flaps: int  # changes of direction, all stages together
    most_replicas: int


@dataclass
class Series:
    """For plots: every five seconds."""

    seconds: list[float] = field(default_factory=list)
    replicas: dict[str, list[int]] = field(default_factory=lambda: {s: [] for s in STAGES})
    late_shares: list[float] = field(default_factory=list)


class Simulation:
    """`configs`: Serve's autoscaling_config of each stage; one without keeps its replicas.

    Nobody lets an autoscaler have all there is: `max_replicas` is twice what the trace's peak takes
    if it is not given.
    """

    def __init__(
        self,
        profile: Profile,
        trace: Trace,
        configs: Mapping[str, Mapping[str, Any]],
        *,
        stages: Iterable[str] = STAGES,
        recording: dict[str, list[Stage]] | None = None,
    ) -> None:
        self.profile = profile
        self.trace = trace
        self.events = Events()
        self.series = Series()
        self.ended = 0
        routing = random.Random(trace.seed)
        windows = math.ceil((WARM_UP_S + trace.duration_s) / WINDOW_S) + 1
        self._late, self._all = [0] * windows, [0] * windows
        self.pools: dict[str, Pool] = {}
        pass_on = self._end
        for name in reversed([*stages]):
            own: PoolProfile | EngineProfile = getattr(profile, name)
            pool = Pool(name, own, self.events, routing, pass_on)
            pool.set_target(_initial(own, trace, profile), at_once=True)
            self.pools[name] = pool
            pass_on = pool.submit
        self._first = pass_on
        self._controllers = [
            Controller(
                self.pools[name],
                serve_config({"max_replicas": self._most(name), **config}),
                self.events,
                None if recording is None else recording.setdefault(name, []),
            )
            for name, config in configs.items()
        ]

    def run(self) -> Outcome:
        """To the end of the trace, and on until all requests have ended."""
        per_load = self.profile.generator.capacity
        arrivals = self.trace.arrivals(per_load)
        events, rng = self.events, random.Random(self.trace.seed)
        mean_tokens = self.profile.generator.answer_tokens

        def arrive(time: float) -> None:
            work = rng.gammavariate(4, 1 / 4)  # both vary by half of their mean
            tokens = max(1, round(rng.gammavariate(4, mean_tokens / 4)))
            self._first(Request(time, work, tokens))
            plan_next()

        def plan_next() -> None:
            time = next(arrivals, None)
            if time is not None:
                events.after(time - events.now, arrive, time)

        plan_next()
        events.every(5.0, self._watch)
        with time_of(events):
            events.run(WARM_UP_S)
            before = {name: pool.replica_seconds() for name, pool in self.pools.items()}
            events.run(WARM_UP_S + self.trace.duration_s)
            after = {name: pool.replica_seconds() for name, pool in self.pools.items()}
            while any(pool.ongoing for pool in self.pools.values()):
                events.run(events.now + 10)
        hours = {name: (after[name] - before[name]) / 3600 for name in self.pools}
        return self._outcome(hours)

    def _most(self, stage: str) -> int:
        capacity: float = getattr(self.profile, stage).capacity
        return math.ceil(2 * self.trace.peak * self.profile.generator.capacity / capacity)

    def _end(self, request: Request) -> None:
        self.ended += 1
        window = int(request.arrived / WINDOW_S)
        self._all[window] += 1
        self._late[window] += self.events.now - request.arrived > self.profile.slo_s

    def _watch(self) -> None:
        self.series.seconds.append(self.events.now - WARM_UP_S)
        for name, pool in self.pools.items():
            self.series.replicas[name].append(pool.alive)

    def _outcome(self, hours: dict[str, float]) -> Outcome:
        shares = [late / max(1, of) for late, of in zip(self._late, self._all, strict=True)]
        self.series.late_shares = shares
        first = int(WARM_UP_S / WINDOW_S)
        requests = sum(self._all[first:])
        return Outcome(
            requests=requests,
            late_share=sum(self._late[first:]) / max(1, requests),
            missed_s=WINDOW_S * sum(share > LATE_SHARE for share in shares[first:]),
            replica_hours=hours,
            cost_hours=sum(hours[name] * pool.profile.cost for name, pool in self.pools.items()),
            flaps=sum(_turns(pool) for pool in self.pools.values()),
            most_replicas=max(
                (sum(counts) for counts in zip(*self.series.replicas.values(), strict=False)),
                default=0,
            ),
        )


def _initial(own: PoolProfile | EngineProfile, trace: Trace, profile: Profile) -> int:
    """Replicas for the first load at two thirds of what they can do."""
    return max(1, math.ceil(trace.load(0) * profile.generator.capacity / own.capacity * 1.5))


def _turns(pool: Pool) -> int:
    """How often the target went up after it had gone down, or the other way round."""
    targets = [target for _, target in pool.changes]
    signs = [later > earlier for earlier, later in pairwise(targets)]
    return sum(one != other for one, other in pairwise(signs))
