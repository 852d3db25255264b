"""A `Recorder` that keeps its values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from blip2_serve.observe.metrics import Counter, Gauge, Histogram, Metric


class FakeRecorder:
    """Keeps values by metric name and label values, in the order of the metric's labels.

    `report` is the function to call every second, which nothing does.
    """

    def __init__(self) -> None:
        self.counted: dict[tuple[str, ...], float] = defaultdict(float)
        self.observed: dict[tuple[str, ...], list[float]] = defaultdict(list)
        self.report: Callable[[], None] = lambda: None

    def add(self, metric: Counter, value: float = 1, **labels: str) -> None:
        assert value >= 0
        if value:
            self.counted[_key(metric, labels)] += value

    def set(self, metric: Gauge, value: float, **labels: str) -> None:
        self.counted[_key(metric, labels)] = value

    def observe(self, metric: Histogram, value: float, **labels: str) -> None:
        self.observed[_key(metric, labels)].append(value)

    def total(self, name: str, *labels: str) -> float:
        """A counter's value, by its name and the values of its labels."""
        return self.counted[name, *labels]

    def report_every_second(self, report: Callable[[], None]) -> None:
        self.report = report


def _key(metric: Metric, labels: dict[str, str]) -> tuple[str, ...]:
    assert labels.keys() == {*metric.labels}, f"{metric.name} has the labels {metric.labels}"
    return metric.name, *(labels[name] for name in metric.labels)
