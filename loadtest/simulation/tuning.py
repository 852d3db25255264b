"""Serve's default policy, tuned by grid search on the training traces.

First each stage alone, over the whole grid; then all stages together, each stage's best ones in
turn: a stage that floods the next one when it has caught up does not know so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from blip2_serve.config import AppConfig, StageConfig
from simulation.profile import EngineProfile, PoolProfile, Profile
from simulation.run import STAGES, Simulation
from simulation.traces import training

Config = Mapping[str, Any]  # Serve's autoscaling_config

# Of the whole request's time, what a stage may take when it is judged alone.
SLO_SHARES = {"preprocessor": 0.15, "encoder": 0.25, "generator": 0.6}
# What late requests cost: if all were late, so many times the replica-hours. An operator who
# looks at the bill, one who looks at both, one who looks at the clock.
LATE_COSTS = (5.0, 20.0, 80.0)

CANDIDATES = 4  # of each stage alone, that are tried together

# Target of ongoing requests, by those that a replica has in work when it is full.
SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.6, 0.8)
UPSCALE_DELAYS_S = (0, 10)
DOWNSCALE_DELAYS_S = (30, 120)
LOOK_BACKS_S = (10, 30)


@dataclass(frozen=True)
class Tried:
    """A configuration, and what it came to on the training traces together."""

    config: Config
    replica_hours: float
    late_share: float

    def cost(self, late_costs: float) -> float:
        return self.replica_hours * (1 + late_costs * self.late_share)


def own_policy() -> dict[str, Config]:
    """This project's policy for each stage, as it is by default."""
    found: dict[str, Config] = {}
    for name in STAGES:
        default: StageConfig = getattr(AppConfig(), name)
        values = {"autoscaling": {"min_replicas": 1}}
        found[name] = type(default).model_validate(values).autoscaling_config or {}
    return found


def grid(own: PoolProfile | EngineProfile) -> list[Config]:
    """Reports come as often as for the own policy: every 2 s, not every 10."""
    full = own.places if isinstance(own, EngineProfile) else own.threads * own.limit
    return [
        {
            "metrics_interval_s": 2,
            "target_ongoing_requests": share * full,
            "upscale_delay_s": up,
            "downscale_delay_s": down,
            "look_back_period_s": look_back,
        }
        for share, up, down, look_back in product(
            SHARES, UPSCALE_DELAYS_S, DOWNSCALE_DELAYS_S, LOOK_BACKS_S
        )
    ]


def alone(profile: Profile, stage: str) -> list[Tried]:
    """The whole grid for one stage, whose load comes as it does from outside."""
    return [_alone(profile, stage, config) for config in grid(getattr(profile, stage))]


def together(
    profile: Profile, found: Mapping[str, list[Tried]], late_costs: float
) -> dict[str, Config]:
    """For each stage the best of those that were best alone."""
    best = {
        stage: sorted(found[stage], key=lambda one: one.cost(late_costs))[:CANDIDATES]
        for stage in STAGES
    }
    chosen = {stage: candidates[0].config for stage, candidates in best.items()}
    for stage in reversed(STAGES):
        whole = [_whole(profile, {**chosen, stage: one.config}) for one in best[stage]]
        costs = [one.cost(late_costs) for one in whole]
        chosen[stage] = best[stage][costs.index(min(costs))].config
    return chosen


def _alone(profile: Profile, stage: str, config: Config) -> Tried:
    hours, late, passed = 0.0, 0, 0
    for trace in training():
        simulation = Simulation(profile, trace, {stage: config}, stages=[stage])
        pool = simulation.pools[stage]
        pool.slo_s = profile.slo_s * SLO_SHARES[stage]
        hours += simulation.run().replica_hours[stage]
        late += pool.late
        passed += pool.passed
    return Tried(config, hours, late / passed)


def _whole(profile: Profile, configs: Mapping[str, Config]) -> Tried:
    outcomes = [Simulation(profile, trace, configs).run() for trace in training()]
    requests = sum(outcome.requests for outcome in outcomes)
    late = sum(outcome.late_share * outcome.requests for outcome in outcomes)
    return Tried({}, sum(outcome.cost_hours for outcome in outcomes), late / requests)
