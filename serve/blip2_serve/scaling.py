"""How many replicas a stage needs: a function of what its replicas measure.

Serve's default policy divides the ongoing requests by a target. A queue is not linear in the load:
near saturation a little more load makes it many times as long, so the quotient overshoots, and far
from it says little. This policy divides the offered load by what a replica can do, both measured,
and adds a headroom for the time that others take to start, and what drains the backlog. The offered
load is what replicas finish and, on top, the growth of what is ongoing: a backlog that moves from
callers to new replicas is no load.

Serve applies its own delays, factors and bounds around the policy. It pickles this module by value
into its controller, which need not have this package: only the standard library is imported here.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Signals:
    """What one replica reports. None: not known yet.

    Items are images in preprocessor and encoder, requests in the generator.
    """

    finished: float = 0.0  # items, a second
    waiting: float = 0.0  # items whose turn has not come
    capacity: float | None = None  # items a second, at its largest batch
    start_s: float | None = None  # seconds that it took to start
    occupancy: float | None = None  # of its places (sequences, KV rows), 0 to 1
    step_s: float | None = None  # seconds of an engine step, lately
    least_step_s: float | None = None  # of them, those that less load would not save

    def report(self) -> dict[str, float]:
        """What `record_autoscaling_stats` returns: Serve wants numbers, and averages each."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Stage:
    """A stage at one moment."""

    replicas: tuple[Signals, ...]  # of those that run and have reported
    running: int
    target: int  # replicas that are to run, as decided before
    ongoing: float  # requests, those included that wait at callers
    growth: float = 0.0  # of them, a second
    queued: float = 0.0  # requests that wait at callers
    bursty: bool = False  # the load comes in bursts, by `Bursts`
    least: int = 1
    most: int = 1


@dataclass(frozen=True)
class Settings:
    """`ScalingConfig` says what they mean, and has the defaults."""

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
    """Replicas that the stage should have.

    The target stays put between "too few" and "too many by `downscale_margin`", so a load that
    wavers around a whole number of replicas moves nothing.
    """
    if stage.running == 0:  # they are starting, or there is no work; a first request is Serve's
        return _bounded(stage.target, stage)
    needed = replicas_needed(stage, settings)
    enough, ample = _ceil(needed), _ceil(needed * (1 + settings.downscale_margin))
    desired = max(enough, min(ample, stage.target))
    return _bounded(max(desired, 1 if stage.ongoing > 0 else 0), stage)


def replicas_needed(stage: Stage, settings: Settings) -> float:
    """Before rounding: what keeps up, what drains the backlog, what the places are enough for."""
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
    """In replicas: what one can do in a second, its `capacity`, is 1."""
    finished = sum(r.finished for r in stage.replicas)
    return max(0.0, (finished + stage.growth) / capacity)


def _capacity(stage: Stage) -> float | None:
    """Items a second of one replica; None while none has measured it."""
    return _mean([r.capacity for r in stage.replicas if r.capacity])


def _headroom(load: float, stage: Stage, settings: Settings) -> float:
    """Replicas for what the load may grow by until others have started.

    What many do by themselves wanders, in sum, by the square root of how many they are, and of how
    long one looks: a large load needs a smaller share of itself than a small one.
    """
    start_s = _mean([r.start_s for r in stage.replicas if r.start_s is not None])
    headroom = settings.headroom * math.sqrt(load * (start_s or 0.0))
    return headroom * (settings.burst_headroom if stage.bursty else 1.0)


def _crowding(replica: Signals, settings: Settings) -> float:
    """How many replicas this one's sequences should be spread over, by places and step time."""
    crowding = (replica.occupancy or 0.0) / settings.target_occupancy
    limit, step, least = settings.max_step_s, replica.step_s, replica.least_step_s
    if limit is None or step is None or least is None or least >= limit:
        return crowding  # no limit, or one that no number of replicas would keep
    return max(crowding, (step - least) / (limit - least))


def _mean(numbers: list[float]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None


def _ceil(number: float) -> int:
    return math.ceil(number - 1e-9)  # 0.6 / 0.2 is a little more than 3


def _bounded(replicas: int, stage: Stage) -> int:
    return max(stage.least, min(stage.most, replicas))


class Trend:
    """How fast a number grows, over the last `seconds`."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque()  # times and numbers

    def growth(self, now: float, number: float, seconds: float) -> float:
        """A second. 0 until the number has been seen for so long."""
        self._seen.append((now, number))
        while len(self._seen) > 1 and self._seen[1][0] <= now - seconds:
            self._seen.popleft()
        then, before = self._seen[0]
        return (number - before) / (now - then) if now - then >= seconds else 0.0


class Bursts:
    """Whether a load has risen more than once lately: what came twice may come again.

    A rise is one by LEAST_SHARE of the load and LEAST_REPLICAS, and again from where the load has
    fallen by as much. Rises within APART_S are one: a backlog makes the measured load waver.
    """

    LATELY_S = 480.0
    APART_S = 60.0
    LEAST_SHARE = 0.3
    LEAST_REPLICAS = 0.6

    def __init__(self) -> None:
        self._rises: deque[float] = deque()  # times
        # The least load since it fell, or the largest since it rose.
        self._turn: float | None = None
        self._risen = False

    def seen(self, now: float, load: float) -> bool:
        """Takes the load of one moment after another."""
        turn = load if self._turn is None else self._turn
        self._turn = max(turn, load) if self._risen else min(turn, load)
        low, high = sorted((self._turn, load))
        if high > low * (1 + self.LEAST_SHARE) + self.LEAST_REPLICAS:
            self._risen, self._turn = not self._risen, load
            if self._risen and (not self._rises or now - self._rises[-1] >= self.APART_S):
                self._rises.append(now)
        while self._rises and self._rises[0] < now - self.LATELY_S:
            self._rises.popleft()
        return len(self._rises) > 1


class StagePolicy:
    """For `AutoscalingPolicy(policy_function="blip2_serve.scaling:StagePolicy")`."""

    def __init__(self, **settings: Any) -> None:
        self._settings = Settings(**settings)
        self._ongoing = Trend()
        self._bursts = Bursts()

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """`ctx` is Serve's AutoscalingContext; nothing is kept in its state."""
        # Callers report in steps: each of them once in this time.
        interval_s = ctx.config.metrics_interval_s
        growth = self._ongoing.growth(ctx.current_time, ctx.total_num_requests, interval_s)
        stage = stage_of(ctx, growth)
        if capacity := _capacity(stage):
            bursty = self._bursts.seen(ctx.current_time, offered_load(stage, capacity))
            stage = replace(stage, bursty=bursty)
        return desired_replicas(stage, self._settings), {}


def stage_of(ctx: Any, growth: float) -> Stage:
    """What the policy needs of Serve's context; `growth` is that of the ongoing requests."""
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
        least=ctx.capacity_adjusted_min_replicas,
        most=ctx.capacity_adjusted_max_replicas,
    )
