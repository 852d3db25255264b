"""What the stages' configurations share: replicas, resources, scaling. See `config.py`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

# Fields whose default differs from stage to stage.
NumCpus = Annotated[float, Field(ge=0, description="CPU cores that Ray reserves for each replica.")]
InitialOngoingRequests = Annotated[
    float,
    Field(
        gt=0,
        description="Target for ongoing requests per replica while no replica has measured its "
        "capacity (ingress replicas never do). Ray Serve's target_ongoing_requests has no effect.",
    ),
]

HOW_IT_SCALES = "How this package's autoscaling policy chooses the number of replicas."


class FrozenConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


# Ray Serve's keys for a stage that scales by this package's policy, unless `autoscaling` sets them.
# Ray Serve's own delays are for a policy that overshoots. `look_back_period_s` must be above
# `metrics_interval_s`.
AUTOSCALING_DEFAULTS: Mapping[str, float] = MappingProxyType(
    {
        "metrics_interval_s": 2,
        "look_back_period_s": 2.5,
        "upscale_delay_s": 0,
        "downscale_delay_s": 10,
        "downscale_to_zero_delay_s": 600,  # only where min_replicas is 0
    }
)


class ScalingConfig(FrozenConfig):
    """Settings of the policy in `scaling.py`. Bounds and delays are Ray Serve's, in `autoscaling`.

    The defaults come from simulations (`loadtest/README.md`).
    """

    target_utilization: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Target share of a replica's measured capacity that the offered load may use.",
    )
    headroom: float = Field(
        0.62,
        ge=0,
        description="Factor for the spare replicas, which allow for growth of the load while new "
        "replicas start: headroom times the square root of (replicas that the load fills times "
        "seconds that a replica takes to start).",
    )
    burst_headroom: float = Field(
        1.4,
        ge=1,
        description="Factor by which the headroom grows if the load has risen sharply at least "
        "twice in the last 8 minutes.",
    )
    backlog_drain_s: float = Field(
        0.3, gt=0, description="Seconds within which a backlog should be worked off."
    )
    max_surge: float = Field(
        5.0,
        ge=1,
        description="Most replicas that a backlog may ask for, as a multiple of those that the "
        "load alone fills.",
    )
    downscale_margin: float = Field(
        0.1,
        ge=0,
        description="Share by which the remaining replicas must exceed the need before any replica "
        "is stopped.",
    )
    target_occupancy: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Target share of a generator replica's places in use: of max_num_seqs and of "
        "its KV slots.",
    )
    max_step_s: float | None = Field(
        0.1,
        gt=0,
        description="Longest time between two tokens of an answer to aim at, in seconds (an engine "
        "step of a generator replica); null: any.",
    )
    initial_ongoing_requests: InitialOngoingRequests = 4.0


class StageConfig(FrozenConfig):
    """Replicas of one stage, and what each of them gets.

    By default all stages together fit one CPU core; clusters should reserve real resources.
    """

    num_replicas: int = Field(1, ge=1, description="Number of replicas, unless autoscaling is set.")
    autoscaling: dict[str, Any] | None = Field(
        None,
        description="Ray Serve's autoscaling_config, used instead of num_replicas. Unless it has a "
        "policy of its own, the stage scales by the settings in scaling. With min_replicas: 0, an "
        "idle stage has no replicas.",
    )
    scaling: ScalingConfig = Field(ScalingConfig(), description=HOW_IT_SCALES)
    num_cpus: NumCpus = 0.1
    resources: dict[str, float] = Field(
        {},
        description="Custom Ray resources that each replica reserves, as amounts by name. They "
        "place a stage on nodes that have them.",
    )
    max_surge_percent: int = Field(
        100,
        ge=0,
        le=100,
        description="Most new replicas, as a percentage of the stage's number, that start before "
        "old ones stop while a running application is changed. If there is no room for any, the "
        "change waits; 0 stops an old one first. Always 0 where encoder and generator share a "
        "cluster's only GPU by default.",
    )
    max_ongoing_requests: int = Field(
        256, ge=1, description="Requests that one replica may have at once; others wait at callers."
    )
    max_queued_requests: int = Field(
        1024,
        ge=1,
        description="Requests that may wait for a replica at each caller (an HTTP proxy or an "
        "ingress replica); more are refused with status 503.",
    )

    @property
    def may_be_at_zero(self) -> bool:
        """Whether it may have no replicas while it is idle."""
        return self.autoscaling is not None and self.autoscaling.get("min_replicas") == 0

    @property
    def autoscaling_config(self) -> dict[str, Any] | None:
        """Ray Serve's, with this package's policy unless it has another; None: no autoscaling."""
        if not self.autoscaling or "policy" in self.autoscaling:
            return self.autoscaling or None
        policy = {
            "policy_function": "blip2_serve.scaling:StagePolicy",
            "policy_kwargs": self.scaling.model_dump(),
        }
        return {**AUTOSCALING_DEFAULTS, **self.autoscaling, "policy": policy}


class ComputeConfig(StageConfig):
    """A stage that runs a part of the model."""

    num_gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs that Ray reserves for each replica. Default: none on a CPU; a share of "
        "the GPU if the cluster has exactly one; else a whole GPU.",
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads that torch uses in each replica. Default: all cores that the "
        "replica may use.",
    )
