"""The catalogue: names follow Prometheus' rules."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client import Counter as PrometheusCounter
from prometheus_client import Gauge as PrometheusGauge
from prometheus_client import Histogram as PrometheusHistogram

from blip2_serve.observe import metrics
from blip2_serve.observe.metrics import Counter, Gauge, Histogram, Metric

BASE_UNITS = ("_seconds", "_bytes", "_slots", "_tokens", "_size", "_capacity")


def test_names_are_unique() -> None:
    names = [metric.name for metric in metrics.catalogue()]
    assert len({*names}) == len(names)


def test_prometheus_own_library_registers_the_whole_catalogue() -> None:
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
        assert min(metric.buckets) > 0  # Ray requires it


def test_the_catalogue_has_every_metric_in_order_and_exact_sums_behind_histograms() -> None:
    first, last = metrics.REQUESTS, metrics.NODE_UP
    duration = metrics.REQUEST_DURATION

    found = metrics.catalogue()
    assert found[:3] == [first, duration, duration.exact_sum]
    assert found[-1] == last


def test_the_table_has_a_line_for_every_metric() -> None:
    lines = metrics.table().splitlines()[2:]

    assert len(lines) == len(metrics.DEFINED)
    assert lines[0].startswith("| `ray_blip2_requests_total` | counter | route, outcome |")
    assert "`ray_blip2_request_duration_seconds_exact_total` | histogram" in lines[1]
