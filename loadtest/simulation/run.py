"""Runs one trace through the three stages, scaled by one policy."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from blip2_serve.config import AppConfig
from blip2_serve.scaling import Stage
from blip2_serve.stage_config import StageConfig
from loadtest.simulation.controller import Controller, serve_config, time_of
from loadtest.simulation.events import Events
from loadtest.simulation.pools import Pool, Request
from loadtest.simulation.profile import Configs, Profile, StageProfile
from loadtest.simulation.traces import WARM_UP_S, Trace

STAGES = ("preprocessor", "encoder", "generator")
WINDOW_S = 5.0  # requests that arrive in the same window are judged together
LATE_SHARE = 0.05  # of a window's requests; beyond it, the window misses the SLO


@dataclass(frozen=True)
class Outcome:
    """What happened after the warm-up."""

    requests: int
    late_share: float  # of all requests
    missed_s: float  # total length of the windows that missed the SLO; for a step, the recovery
    replica_hours: dict[str, float]
    cost_hours: float  # replica-hours weighted by cost
    flaps: int  # changes of direction of all stages' targets


def own_policy() -> Configs:
    """This project's policy with its defaults, for each stage."""
    found = {}
    for name in STAGES:
        default: StageConfig = getattr(AppConfig(), name)
        values = {"autoscaling": {"min_replicas": 1}}
        found[name] = type(default).model_validate(values).autoscaling_config or {}
    return found


class Simulation:
    """A stage without a config keeps its replicas.

    `max_replicas` is by default twice what the trace's peak needs, since nobody gives an autoscaler
    everything there is.
    """

    def __init__(
        self,
        profile: Profile,
        trace: Trace,
        configs: Configs,
        *,
        stages: Iterable[str] = STAGES,
        recording: dict[str, list[Stage]] | None = None,
    ) -> None:
        """`recording` collects the signals of each decision by stage."""
        self.profile = profile
        self.trace = trace
        self.events = Events()
        self.ended = 0
        routing = random.Random(trace.seed)
        windows = math.ceil((WARM_UP_S + trace.duration_s) / WINDOW_S) + 1
        self._late, self._all = [0] * windows, [0] * windows
        self.pools: dict[str, Pool] = {}
        pass_on = self._end
        for name in reversed([*stages]):
            stage = profile.stages[name]
            pool = Pool(name, stage, self.events, routing, pass_on)
            pool.set_target(self._enough(stage, trace.load(0), 1.5), at_once=True)
            self.pools[name] = pool
            pass_on = pool.submit
        self._first = pass_on
        self._controllers = [
            Controller(
                self.pools[name],
                serve_config(
                    {"max_replicas": self._enough(profile.stages[name], trace.peak, 2), **config}
                ),
                self.events,
                None if recording is None else recording.setdefault(name, []),
            )
            for name, config in configs.items()
        ]

    def run(self) -> Outcome:
        """Runs to the end of the trace, and on until all requests have ended."""
        events = self.events
        self._start_arrivals()
        with time_of(events):
            events.run(WARM_UP_S)
            before = {name: pool.replica_seconds() for name, pool in self.pools.items()}
            events.run(WARM_UP_S + self.trace.duration_s)
            after = {name: pool.replica_seconds() for name, pool in self.pools.items()}
            while any(pool.ongoing for pool in self.pools.values()):
                events.run(events.now + 10)
        return self._outcome({name: (after[name] - before[name]) / 3600 for name in self.pools})

    def _start_arrivals(self) -> None:
        arrivals = self.trace.arrivals(self.profile.generator.capacity)
        events, rng = self.events, random.Random(self.trace.seed)
        mean_tokens = self.profile.generator.answer_tokens

        def arrive(time: float) -> None:
            work = rng.gammavariate(4, 1 / 4)  # the deviation of both is half of their mean
            tokens = max(1, round(rng.gammavariate(4, mean_tokens / 4)))
            self._first(Request(time, work, tokens))
            plan_next()

        def plan_next() -> None:
            time = next(arrivals, None)
            if time is not None:
                events.after(time - events.now, arrive, time)

        plan_next()

    def _enough(self, stage: StageProfile, load: float, factor: float) -> int:
        """`factor` times the replicas that a load, in generators, needs."""
        return max(1, math.ceil(load * self.profile.generator.capacity / stage.capacity * factor))

    def _end(self, request: Request) -> None:
        self.ended += 1
        window = int(request.arrived / WINDOW_S)
        self._all[window] += 1
        self._late[window] += self.events.now - request.arrived > self.profile.slo_s

    def _outcome(self, hours: dict[str, float]) -> Outcome:
        first = int(WARM_UP_S / WINDOW_S)
        windows = [*zip(self._late, self._all, strict=True)][first:]
        requests = sum(all_ for _, all_ in windows)
        return Outcome(
            requests=requests,
            late_share=sum(late for late, _ in windows) / max(1, requests),
            missed_s=WINDOW_S * sum(late / max(1, all_) > LATE_SHARE for late, all_ in windows),
            replica_hours=hours,
            cost_hours=sum(hours[name] * pool.profile.cost for name, pool in self.pools.items()),
            flaps=sum(_turns(pool) for pool in self.pools.values()),
        )


def _turns(pool: Pool) -> int:
    """How often the target's direction changed."""
    targets = [target for _, target in pool.changes]
    ups = [later > earlier for earlier, later in pairwise(targets)]
    return sum(one != other for one, other in pairwise(ups))
