"""Serve's controller for a simulated pool: reports, look-back averages, decisions.

Policies, delays, factors and averages of queue lengths are Ray's own functions. Simplified are: all
replicas of a pool report at the same moments, a replica's signals are averaged when it reports, and
decisions are made once per second instead of ten times.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from types import SimpleNamespace
from typing import Any
from unittest import mock

from ray.serve import autoscaling_policy
from ray.serve._private.autoscaling_state import _resolve_policy_callable
from ray.serve._private.common import TimeStampedValue
from ray.serve._private.constants import RAY_SERVE_AUTOSCALING_METRIC_RECORD_INTERVAL_FACTOR
from ray.serve._private.metrics_utils import aggregate_timeseries
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from blip2_serve.scaling import Signals, Stage, Trend, stage_of
from loadtest.simulation.events import Events
from loadtest.simulation.pools import Pool, Replica

DECISION_INTERVAL_S = 1.0
SIGNALS = [field.name for field in fields(Signals)]


def serve_config(values: dict[str, Any]) -> AutoscalingConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # metrics_interval_s is deprecated without a successor
        return AutoscalingConfig(**values)


@contextmanager
def time_of(events: Events) -> Iterator[None]:
    """Makes Ray's delays follow simulated time."""
    clock = SimpleNamespace(time=lambda: events.now)
    with mock.patch.object(autoscaling_policy, "time", clock):
        yield


class Controller:
    """Scales one pool. Run the events under `time_of`."""

    def __init__(
        self,
        pool: Pool,
        config: AutoscalingConfig,
        events: Events,
        recording: list[Stage] | None = None,
    ) -> None:
        self._pool = pool
        self._config = config
        self._events = events
        self._recording = recording
        self._trend = Trend()
        self._policy = _apply_autoscaling_config(_resolve_policy_callable(config.policy))
        self._state: dict[str, Any] = {}
        # The default policy looks at requests only, so it needs no signals.
        self._reads_signals = not config.policy.is_default_policy_function()
        self._ongoing: deque[TimeStampedValue] = deque()
        self._queued: deque[TimeStampedValue] = deque()
        self._reported: tuple[list[TimeStampedValue], list[TimeStampedValue]] = ([], [])
        self._signals: dict[str, dict[Replica, float]] = {}
        interval = config.metrics_interval_s
        factor = RAY_SERVE_AUTOSCALING_METRIC_RECORD_INTERVAL_FACTOR
        events.every(min(factor * config.look_back_period_s, interval), self._record)
        events.every(interval, self._report)
        events.every(DECISION_INTERVAL_S, self._decide)

    def _record(self) -> None:
        now, pool = self._events.now, self._pool
        self._ongoing.append(TimeStampedValue(now, float(pool.ongoing)))
        self._queued.append(TimeStampedValue(now, float(len(pool.queue))))
        for series in (self._ongoing, self._queued):
            while series[0].timestamp < now - self._config.look_back_period_s:
                series.popleft()
        if self._reads_signals:
            for replica in pool.replicas:
                replica.samples.append(replica.signals())
                if len(replica.samples) > len(self._ongoing):
                    replica.samples.popleft()

    def _report(self) -> None:
        self._reported = ([*self._ongoing], [*self._queued])
        self._signals = {name: {} for name in SIGNALS}
        for replica in self._pool.replicas:
            for name in SIGNALS if replica.samples else ():
                known = [v for s in replica.samples if (v := getattr(s, name)) is not None]
                if known:
                    self._signals[name][replica] = sum(known) / len(known)

    def _decide(self) -> None:
        context = self._context()
        if self._recording is not None:
            interval_s = self._config.metrics_interval_s
            growth = self._trend.growth(
                context.current_time, context.total_num_requests, interval_s
            )
            self._recording.append(stage_of(context, growth))
        decision, self._state = self._policy(context)
        bounds = (self._config.min_replicas, self._config.max_replicas)
        self._pool.set_target(max(bounds[0], min(bounds[1], int(-(-decision // 1)))))

    def _context(self) -> AutoscalingContext:
        pool, now = self._pool, self._events.now
        ongoing, queued = (self._mean(series) for series in self._reported)
        return AutoscalingContext(
            deployment_id=pool.name,
            deployment_name=pool.name,
            app_name="simulation",
            current_num_replicas=len(pool.replicas),
            target_num_replicas=pool.target,
            running_replicas=pool.replicas,
            total_num_requests=ongoing,
            total_queued_requests=queued,
            aggregated_metrics=self._signals,
            raw_metrics=None,
            capacity_adjusted_min_replicas=self._config.min_replicas,
            capacity_adjusted_max_replicas=self._config.max_replicas,
            policy_state=self._state.copy(),
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now,
            config=self._config,
        )

    def _mean(self, series: list[TimeStampedValue]) -> float:
        if not series:
            return 0.0
        last_s = max(self._events.now - series[-1].timestamp, 1e-3)
        return aggregate_timeseries(series, self._config.aggregation_function, last_s) or 0.0
