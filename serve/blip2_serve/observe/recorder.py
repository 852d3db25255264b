"""The metrics of a replica, on their way to Ray's exporter."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from ray.serve import metrics as ray_metrics

from blip2_serve.observe import metrics
from blip2_serve.observe.metrics import Counter, Gauge, Histogram, Metric, Recorder, harmless

EVERY_S = 1.0
MOST_PENDING = 100_000  # beyond that, the oldest are lost: Ray has stopped taking them


def ray_metric(metric: Metric) -> Any:
    """Ray's own, which its exporter knows."""
    labels: Any = metric.labels  # Ray's annotation says one
    if isinstance(metric, Histogram):
        return ray_metrics.Histogram(
            metric.name, metric.help, boundaries=[*metric.buckets], tag_keys=labels
        )
    kind = ray_metrics.Counter if isinstance(metric, Counter) else ray_metrics.Gauge
    return kind(metric.name, metric.help, tag_keys=labels)


class RayRecorder:
    """A `Recorder` for this replica; Ray adds its deployment, replica and application.

    Measurements reach Ray once a second, from a thread: a call of Ray's takes 5 to 10 microseconds,
    several times that in a process that has just woken, and a request would wait for some 25.
    """

    def __init__(
        self, make: Callable[[Metric], Any] = ray_metric, every_s: float = EVERY_S
    ) -> None:
        self._make = make
        self._every_s = every_s
        self._pending: deque[Callable[[], None]] = deque(maxlen=MOST_PENDING)
        self._made: dict[str, Any] = {}
        self._report: Callable[[], None] = lambda: None
        threading.Thread(target=self._run, name="metrics", daemon=True).start()

    def report_by(self, report: Callable[[], None]) -> None:
        """Calls `report` once per second, in the thread: for what is a state, not an event."""
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
        tell = harmless(lambda measurement: measurement())
        while True:
            time.sleep(self._every_s)
            self._report()
            while self._pending:
                tell(self._pending.popleft())

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


@contextmanager
def stage_seconds(recorder: Recorder, stage: str) -> Iterator[None]:
    """Measures the block as one request's time in the stage."""
    start = time.perf_counter()
    try:
        yield
    finally:
        recorder.observe(metrics.STAGE_DURATION, time.perf_counter() - start, stage=stage)
