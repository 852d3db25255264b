"""Serve's default policy, tuned by grid search on the training traces, each stage alone."""

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

BOUNDS = {"min_replicas": 1, "max_replicas": 1000}
# Of the whole request's time, what a stage may take when it is judged alone.
SLO_SHARES = {"preprocessor": 0.15, "encoder": 0.25, "generator": 0.6}
# What late requests cost: if all were late, so many times the replica-hours. An operator who
# looks at the bill, one who looks at both, one who looks at the clock.
LATE_COSTS = (5.0, 20.0, 80.0)

# Target of ongoing requests, by those that a replica has in work when it is full.
SHARES = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
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
    """This project's policy as it is configured by default, for each stage."""
    values = {name: {"autoscaling": BOUNDS} for name in STAGES}
    config = AppConfig.model_validate(values)
    stages: dict[str, StageConfig] = {name: getattr(config, name) for name in STAGES}
    return {name: stage.autoscaling_config or {} for name, stage in stages.items()}


def grid(own: PoolProfile | EngineProfile) -> list[Config]:
    """Reports come as often as for the own policy: every 2 s, not every 10."""
    full = own.places if isinstance(own, EngineProfile) else own.threads * own.limit
    return [
        {
            **BOUNDS,
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


def tried(profile: Profile, stage: str, config: Config) -> Tried:
    hours, late, passed = 0.0, 0, 0
    for trace in training():
        simulation = Simulation(profile, trace, {stage: config}, stages=[stage])
        pool = simulation.pools[stage]
        pool.slo_s = profile.slo_s * SLO_SHARES[stage]
        hours += simulation.run().replica_hours[stage]
        late += pool.late
        passed += pool.passed
    return Tried(config, hours, late / passed)
