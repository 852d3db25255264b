"""The metrics of a replica, on their way to Ray's exporter."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray.serve import metrics as ray_metrics

from blip2_serve import metrics
from blip2_serve.metrics import Counter, Gauge, Histogram, Metric, Recorder

PULSE_S = 1.0


class RayRecorder:
    """A `Recorder` for this replica; Ray adds its deployment, replica and application."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._making = threading.Lock()

    def add(self, metric: Counter, value: float = 1, **labels: str) -> None:
        if value:
            self._of(metric).inc(value, labels)

    def set(self, metric: Gauge, value: float, **labels: str) -> None:
        self._of(metric).set(value, labels)

    def observe(self, metric: Histogram, value: float, **labels: str) -> None:
        self._of(metric).observe(value, labels)
        self.add(metric.exact_sum, value, **labels)

    def _of(self, metric: Metric) -> Any:
        if made := self._made.get(metric.name):
            return made
        with self._making:
            return self._made.setdefault(metric.name, _make(metric))


def _make(metric: Metric) -> Any:
    labels: Any = metric.labels  # Ray's annotation says one
    if isinstance(metric, Histogram):
        return ray_metrics.Histogram(
            metric.name, metric.help, boundaries=[*metric.buckets], tag_keys=labels
        )
    kind = ray_metrics.Counter if isinstance(metric, Counter) else ray_metrics.Gauge
    return kind(metric.name, metric.help, tag_keys=labels)


@contextmanager
def stage_seconds(recorder: Recorder, stage: str) -> Iterator[None]:
    """Measures the block as one request's time in the stage."""
    start = time.perf_counter()
    try:
        yield
    finally:
        recorder.observe(metrics.STAGE_SECONDS, time.perf_counter() - start, stage=stage)


async def pulse(report: Callable[[], None]) -> None:
    """Calls `report` again and again: for what is a state, not an event."""
    while True:
        report()
        await asyncio.sleep(PULSE_S)
