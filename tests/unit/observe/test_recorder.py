"""Handing measurements to Ray: all arrive, in order, even if one fails."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from blip2_serve.observe import metrics, recorder
from blip2_serve.observe.recorder import RayRecorder


class Ray:
    """Stands in for Ray's metrics and keeps what they are given."""

    def __init__(self) -> None:
        self.given: list[tuple[Any, ...]] = []
        self.made: list[str] = []
        self.done = threading.Event()

    def recorder(self) -> RayRecorder:
        return RayRecorder(self._make, interval_s=0.01)

    def _make(self, metric: metrics.Metric) -> Any:
        self.made.append(metric.name)
        given, done = self.given, self.done

        class Made:
            def inc(self, value: float, labels: dict[str, str]) -> None:
                if value < 0:
                    raise ValueError("counters do not fall")
                given.append((metric.name, value, labels))

            def observe(self, value: float, labels: dict[str, str]) -> None:
                given.append((metric.name, value, labels))

            def set(self, value: float, labels: dict[str, str]) -> None:
                given.append((metric.name, value, labels))
                done.set()

        return Made()


def test_measurements_arrive_in_order_and_histograms_with_exact_sums() -> None:
    ray = Ray()
    made = ray.recorder()
    made.add(metrics.REQUESTS, route="/x", outcome="ok")
    made.add(metrics.GENERATED_TOKENS, 0)
    made.observe(metrics.QUEUE_TIME, 0.5, stage="encoder")
    made.observe(metrics.QUEUE_TIME, 0, stage="encoder")
    made.set(metrics.QUEUE_DEPTH, 3, stage="encoder")

    assert ray.done.wait(10)
    stage = {"stage": "encoder"}
    assert ray.given == [
        ("blip2_requests_total", 1, {"route": "/x", "outcome": "ok"}),
        ("blip2_queue_time_seconds", 0.5, stage),
        ("blip2_queue_time_seconds_exact_total", 0.5, stage),
        ("blip2_queue_time_seconds", 0, stage),
        ("blip2_queue_depth", 3, stage),
    ]
    assert len(ray.made) == len({*ray.made})


def test_a_failing_measurement_does_not_stop_the_next() -> None:
    ray = Ray()
    made = ray.recorder()
    made.add(metrics.GENERATED_TOKENS, -1)
    made.set(metrics.QUEUE_DEPTH, 1, stage="x")

    assert ray.done.wait(10)
    assert [name for name, *_ in ray.given] == ["blip2_queue_depth"]


def test_a_report_is_called_repeatedly() -> None:
    called = threading.Semaphore(0)
    Ray().recorder().report_every_second(called.release)

    assert called.acquire(timeout=10)
    assert called.acquire(timeout=10)


def test_a_failing_report_is_called_again_and_stops_no_measurement() -> None:
    ray, called = Ray(), threading.Semaphore(0)

    failures = [RuntimeError("CUDA error: device-side assert triggered") for _ in range(2)]

    def report() -> None:
        called.release()
        if failures:  # only twice: the thread outlives this test
            raise failures.pop()

    made = ray.recorder()
    made.report_every_second(report)
    assert called.acquire(timeout=10)
    made.set(metrics.QUEUE_DEPTH, 1, stage="x")

    assert ray.done.wait(10)
    for _ in range(3):
        assert called.acquire(timeout=10)


def test_measurements_do_not_pile_up_if_ray_takes_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recorder, "MAX_PENDING", 3)
    stuck = threading.Event()
    made = Ray().recorder()
    made.report_every_second(stuck.wait)
    for value in range(10):
        made.set(metrics.QUEUE_DEPTH, value, stage="x")
    assert len(made._pending) <= 3
    stuck.set()
