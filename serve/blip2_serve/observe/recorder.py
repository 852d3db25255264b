"""Carries a replica's measurements to Ray's metrics exporter."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from ray.serve import metrics as ray_metrics

from blip2_serve.observe.metrics import Counter, Gauge, Histogram, Metric, harmless

INTERVAL_S = 1.0
MAX_PENDING = 100_000  # measurements; beyond that the oldest are lost: Ray has stopped taking them


def ray_metric(metric: Metric) -> Any:
    """Makes the metric in Ray, whose exporter then knows it."""
    labels: Any = metric.labels  # Ray annotates tag_keys as a tuple of one
    if isinstance(metric, Histogram):
        return ray_metrics.Histogram(
            metric.name, metric.help, boundaries=[*metric.buckets], tag_keys=labels
        )
    kind = ray_metrics.Counter if isinstance(metric, Counter) else ray_metrics.Gauge
    return kind(metric.name, metric.help, tag_keys=labels)


class RayRecorder:
    """The `Recorder` of a replica. Ray adds the labels deployment, replica and application.

    A thread hands measurements to Ray once per second: a call into Ray takes 5 to 10 microseconds,
    several times that in a process that has just woken, and a request makes about 25 of them.
    """

    def __init__(
        self, make: Callable[[Metric], Any] = ray_metric, interval_s: float = INTERVAL_S
    ) -> None:
        self._make = make
        self._interval_s = interval_s
        self._pending: deque[Callable[[], None]] = deque(maxlen=MAX_PENDING)
        self._made: dict[str, Any] = {}
        self._report: Callable[[], None] = lambda: None
        threading.Thread(target=self._run, name="metrics", daemon=True).start()

    def report_every_second(self, report: Callable[[], None]) -> None:
        self._report = harmless(report)

    def add(self, metric: Counter, value: float = 1, **labels: str) -> None:
        if value:
            self._pending.append(partial(self._add, metric, value, labels))

    def set(self, metric: Gauge, value: float, **labels: str) -> None:
        self._pending.append(partial(self._set, metric, value, labels))

    def observe(self, metric: Histogram, value: float, **labels: str) -> None:
        self._pending.append(partial(self._observe, metric, value, labels))

    # -- in the thread -----------------------------------------------------------------------

    def _run(self) -> None:
        record = harmless(lambda measurement: measurement())
        while True:
            time.sleep(self._interval_s)
            self._report()
            while self._pending:
                record(self._pending.popleft())

    def _add(self, metric: Counter, value: float, labels: dict[str, str]) -> None:
        self._of(metric).inc(value, labels)

    def _set(self, metric: Gauge, value: float, labels: dict[str, str]) -> None:
        self._of(metric).set(value, labels)

    def _observe(self, metric: Histogram, value: float, labels: dict[str, str]) -> None:
        self._of(metric).observe(value, labels)
        if value:
            self._of(metric.exact_sum).inc(value, labels)

    def _of(self, metric: Metric) -> Any:
        made = self._made.get(metric.name)
        if made is None:
            made = self._made[metric.name] = self._make(metric)
        return made
