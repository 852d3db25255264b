"""Decides how many replicas a stage needs from what its replicas measure.

Serve's default policy divides the ongoing requests by a target. But a queue does not grow in
proportion to the load: near saturation a little more load makes it many times longer, so that
policy overshoots, and far from saturation the queue says little. This policy divides the offered
load by the capacity of a replica, both measured, and adds headroom for the time that replicas take
to start and enough to drain the backlog. The offered load is what replicas finish, plus what the
ingress refused because they were busy, plus the growth of the ongoing requests: a backlog that
moves from callers to new replicas does not count as load.

Serve applies its own delays, factors and bounds on top. It pickles this module by value into its
controller, which may not have this package installed: import only the standard library here.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Signals:
    """What one replica reports; None is unknown yet.

    An item is an image in the preprocessor and the encoder, and a request in the generator.
    """

    finished: float = 0.0  # items per second
    waiting: float = 0.0  # items in the replica that are not being computed yet
    capacity: float | None = None  # items per second with full batches
    start_s: float | None = None  # seconds from the start of its process until it was ready
    refused: float = 0.0  # items per second that the stage was too busy to be given
    occupancy: float | None = None  # share of its sequences or KV slots in use, the larger; 0 to 1
    step_s: float | None = None  # mean seconds of the latest engine steps
    fixed_step_s: float | None = None  # seconds of a step that do not depend on the load

    def report(self) -> dict[str, float]:
        """The dict for `record_autoscaling_stats`: Serve takes numbers and averages each."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Stage:
    """A stage at one moment."""

    replicas: tuple[Signals, ...]  # of running replicas that have reported
    running: int  # running replicas
    target: int  # replicas decided on last time
    ongoing: float  # requests at replicas and at callers
    growth: float = 0.0  # of `ongoing`, requests per second
    queued: float = 0.0  # requests waiting at callers
    bursty: bool = False  # whether the load comes in bursts, as `Bursts` tells
    min_replicas: int = 1
    max_replicas: int = 1


@dataclass(frozen=True)
class Settings:
    """The fields of `ScalingConfig`, which describes them and has the defaults."""

    target_utilization: float
    headroom: float
    burst_headroom: float
    backlog_drain_s: float
    max_surge: float
    downscale_margin: float
    target_occupancy: float
    max_step_s: float | None
    initial_ongoing_requests: float


def desired_replicas(stage: Stage, settings: Settings) -> int:
    """Returns how many replicas the stage should have.

    The target stays while it is neither too small nor too large by more than `downscale_margin`, so
    a load that wavers around a whole number of replicas changes nothing.
    """
    if stage.running == 0:  # replicas are starting, or the stage is idle: Serve wakes it up
        return _bounded(stage.target, stage)
    needed = replicas_needed(stage, settings)
    enough, ample = _ceil(needed), _ceil(needed * (1 + settings.downscale_margin))
    desired = max(enough, min(ample, stage.target))
    return _bounded(max(desired, 1 if stage.ongoing > 0 else 0), stage)


def replicas_needed(stage: Stage, settings: Settings) -> float:
    """Returns the replicas to keep up, to drain the backlog or to avoid crowding: the largest.

    Not rounded, not bounded.
    """
    capacity = _capacity(stage)
    if capacity is None:
        return stage.ongoing / settings.initial_ongoing_requests
    load = offered_load(stage, capacity)
    finished = sum(r.finished for r in stage.replicas) / capacity
    backlog = (stage.queued + sum(r.waiting for r in stage.replicas)) / capacity
    keep_up = load / settings.target_utilization + _headroom(load, stage, settings)
    drain = min(load + backlog / settings.backlog_drain_s, settings.max_surge * max(load, finished))
    crowded = sum(_crowding(r, settings) for r in stage.replicas)
    return max(keep_up, drain, crowded)


def offered_load(stage: Stage, capacity: float) -> float:
    """Returns the load in replicas: 1 is what one of `capacity` items per second can do."""
    asked = sum(r.finished + r.refused for r in stage.replicas)
    return max(0.0, (asked + stage.growth) / capacity)


def _capacity(stage: Stage) -> float | None:
    """Mean items per second that a replica can do; None while no replica knows."""
    return _mean([r.capacity for r in stage.replicas if r.capacity])


def _headroom(load: float, stage: Stage, settings: Settings) -> float:
    """Replicas for how much the load may grow until more have started.

    Independent requests fluctuate by the square root of their number, which grows with the load and
    with the time looked at: a large load needs a smaller share of headroom than a small one.
    """
    start_s = _mean([r.start_s for r in stage.replicas if r.start_s is not None])
    headroom = settings.headroom * math.sqrt(load * (start_s or 0.0))
    return headroom * (settings.burst_headroom if stage.bursty else 1.0)


def _crowding(replica: Signals, settings: Settings) -> float:
    """How many replicas this one's sequences should spread over, by occupancy and step time."""
    crowding = (replica.occupancy or 0.0) / settings.target_occupancy
    limit, step, fixed = settings.max_step_s, replica.step_s, replica.fixed_step_s
    if limit is None or step is None or fixed is None or fixed >= limit:
        return crowding  # there is no limit, or more replicas would not keep it
    return max(crowding, (step - fixed) / (limit - fixed))


def _mean(numbers: list[float]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None


def _ceil(number: float) -> int:
    return math.ceil(number - 1e-9)  # 0.6 / 0.2 is slightly more than 3


def _bounded(replicas: int, stage: Stage) -> int:
    return max(stage.min_replicas, min(stage.max_replicas, replicas))


class Trend:
    """Tells how fast a number grows."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque()  # (time in seconds, number)

    def growth(self, now: float, number: float, seconds: float) -> float:
        """Adds the number of this moment and returns its growth per second over the last `seconds`.

        0 until it has been seen for that long.
        """
        self._seen.append((now, number))
        while len(self._seen) > 1 and self._seen[1][0] <= now - seconds:
            self._seen.popleft()
        then, before = self._seen[0]
        return (number - before) / (now - then) if now - then >= seconds else 0.0


class Bursts:
    """Tells whether a load has surged more than once lately: what came twice may come again.

    A surge is a rise by MIN_SHARE of the load plus MIN_REPLICAS; the next one counts after the load
    has fallen by as much. Surges less than MIN_GAP_S apart are one, since a backlog makes the
    measured load waver.
    """

    WINDOW_S = 480.0
    MIN_GAP_S = 60.0
    MIN_SHARE = 0.3
    MIN_REPLICAS = 0.6

    def __init__(self) -> None:
        self._surges: deque[float] = deque()  # times in seconds
        # The lowest load since the last fall, or the highest since the last rise.
        self._turn: float | None = None
        self._risen = False

    def update(self, now: float, load: float) -> bool:
        """Adds the load (in replicas) of this moment; returns whether the load is bursty."""
        turn = load if self._turn is None else self._turn
        self._turn = max(turn, load) if self._risen else min(turn, load)
        low, high = sorted((self._turn, load))
        if high > low * (1 + self.MIN_SHARE) + self.MIN_REPLICAS:
            self._risen, self._turn = not self._risen, load
            if self._risen and (not self._surges or now - self._surges[-1] >= self.MIN_GAP_S):
                self._surges.append(now)
        while self._surges and self._surges[0] < now - self.WINDOW_S:
            self._surges.popleft()
        return len(self._surges) > 1


class StagePolicy:
    """The policy for Serve: `AutoscalingPolicy(policy_function="blip2_serve.scaling:StagePolicy")`.

    Keyword arguments are the fields of `Settings`.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = Settings(**settings)
        self._ongoing = Trend()
        self._bursts = Bursts()

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """Takes Serve's AutoscalingContext; returns the replicas to have, and no state."""
        # Each caller reports once per interval, so `ongoing` moves in steps within one.
        interval_s = ctx.config.metrics_interval_s
        growth = self._ongoing.growth(ctx.current_time, ctx.total_num_requests, interval_s)
        stage = stage_of(ctx, growth)
        if capacity := _capacity(stage):
            bursty = self._bursts.update(ctx.current_time, offered_load(stage, capacity))
            stage = replace(stage, bursty=bursty)
        return desired_replicas(stage, self._settings), {}


def stage_of(ctx: Any, growth: float) -> Stage:
    """Reads Serve's AutoscalingContext; `growth` is that of the ongoing requests, per second."""
    metrics = ctx.aggregated_metrics or {}
    names = [field.name for field in fields(Signals) if field.name in metrics]
    reported = [r for r in ctx.running_replicas if r in metrics.get("finished", {})]
    return Stage(
        replicas=tuple(
            Signals(**{n: metrics[n][replica] for n in names if replica in metrics[n]})
            for replica in reported
        ),
        running=ctx.current_num_replicas,
        target=ctx.target_num_replicas,
        ongoing=ctx.total_num_requests,
        growth=growth,
        queued=ctx.total_queued_requests or 0.0,
        min_replicas=ctx.capacity_adjusted_min_replicas,
        max_replicas=ctx.capacity_adjusted_max_replicas,
    )
