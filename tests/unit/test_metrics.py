"""The catalogue: names as Prometheus wants them, and the README's table of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client import Counter as PrometheusCounter
from prometheus_client import Gauge as PrometheusGauge
from prometheus_client import Histogram as PrometheusHistogram

from blip2_serve import metrics
from blip2_serve.metrics import Counter, Gauge, Histogram, Metric

README = Path(__file__).parents[2] / "README.md"
BASE_UNITS = ("_seconds", "_bytes", "_rows", "_tokens", "_size", "_places")


def test_the_readme_has_the_catalogue() -> None:
    assert metrics.table() in README.read_text(), "paste the output of this: metrics.table()"


def test_no_name_is_there_twice() -> None:
    names = [metric.name for metric in metrics.catalogue()]
    assert len({*names}) == len(names)


def test_prometheus_own_library_takes_all_of_them_together() -> None:
    registry = CollectorRegistry()
    kinds = {
        Counter: PrometheusCounter,
        Gauge: PrometheusGauge,
        Histogram: PrometheusHistogram,
    }
    for metric in metrics.catalogue():
        more = {"buckets": metric.buckets} if isinstance(metric, Histogram) else {}
        kinds[type(metric)](metric.name, metric.help, metric.labels, registry=registry, **more)


@pytest.mark.parametrize("metric", metrics.catalogue(), ids=lambda metric: metric.name)
def test_names_follow_prometheus_rules(metric: Metric) -> None:
    assert metric.name.startswith("blip2_")
    assert metric.name.endswith("_total") == isinstance(metric, Counter)
    assert not any(f"_{word}" in metric.name for word in ("ms", "millis", "kb", "mb", "percent"))
    assert metric.help.endswith(".")
    if isinstance(metric, Histogram):
        assert metric.name.endswith(BASE_UNITS)
        assert [*metric.buckets] == sorted({*metric.buckets})
        assert min(metric.buckets) > 0  # Ray wants it


def test_every_metric_is_in_the_catalogue() -> None:
    defined = [value for value in vars(metrics).values() if isinstance(value, Metric)]
    assert defined == [*metrics.MEASURED]
