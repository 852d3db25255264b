"""Measurements on their way to Ray: all arrive, in order; one that fails takes no other along."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from blip2_serve.observe import metrics, recorder
from blip2_serve.observe.recorder import RayRecorder, stage_seconds
from support.recorder import FakeRecorder


class Ray:
    """In place of Ray's metrics: notes what they are told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.made: list[str] = []
        self.done = threading.Event()

    def recorder(self) -> RayRecorder:
        return RayRecorder(self._make, every_s=0.01)

    def _make(self, metric: metrics.Metric) -> Any:
        self.made.append(metric.name)
        told, done = self.told, self.done

        class Made:
            def inc(self, value: float, labels: dict[str, str]) -> None:
                if value < 0:
                    raise ValueError("counters do not fall")
                told.append((metric.name, value, labels))

            def observe(self, value: float, labels: dict[str, str]) -> None:
                told.append((metric.name, value, labels))

            def set(self, value: float, labels: dict[str, str]) -> None:
                told.append((metric.name, value, labels))
                done.set()

        return Made()


def test_all_arrive_in_order_and_a_histogram_has_its_exact_sum() -> None:
    ray = Ray()
    made = ray.recorder()
    made.add(metrics.REQUESTS, route="/x", outcome="ok")
    made.add(metrics.GENERATED_TOKENS, 0)
    made.observe(metrics.QUEUE_TIME, 0.5, stage="encoder")
    made.observe(metrics.QUEUE_TIME, 0, stage="encoder")
    made.set(metrics.QUEUE_DEPTH, 3, stage="encoder")

    assert ray.done.wait(10)
    stage = {"stage": "encoder"}
    assert ray.told == [
        ("blip2_requests_total", 1, {"route": "/x", "outcome": "ok"}),
        ("blip2_queue_time_seconds", 0.5, stage),
        ("blip2_queue_time_seconds_exact_total", 0.5, stage),
        ("blip2_queue_time_seconds", 0, stage),
        ("blip2_queue_depth", 3, stage),
    ]
    assert len(ray.made) == len({*ray.made})


def test_one_that_fails_takes_no_other_along() -> None:
    ray = Ray()
    made = ray.recorder()
    made.add(metrics.GENERATED_TOKENS, -1)
    made.set(metrics.QUEUE_DEPTH, 1, stage="x")

    assert ray.done.wait(10)
    assert [name for name, *_ in ray.told] == ["blip2_queue_depth"]


def test_a_state_is_asked_for_again_and_again() -> None:
    asked = threading.Semaphore(0)
    Ray().recorder().report_by(asked.release)

    assert asked.acquire(timeout=10)
    assert asked.acquire(timeout=10)


def test_a_report_that_fails_is_asked_for_again_and_keeps_nothing_back() -> None:
    ray, asked = Ray(), threading.Semaphore(0)

    failures = [RuntimeError("CUDA error: device-side assert triggered") for _ in range(2)]

    def report() -> None:
        asked.release()
        if failures:  # not for ever: the thread outlives this test
            raise failures.pop()

    made = ray.recorder()
    made.report_by(report)
    assert asked.acquire(timeout=10)
    made.set(metrics.QUEUE_DEPTH, 1, stage="x")

    assert ray.done.wait(10)
    for _ in range(3):
        assert asked.acquire(timeout=10)


def test_measurements_that_ray_does_not_take_do_not_pile_up_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recorder, "MOST_PENDING", 3)
    stuck = threading.Event()
    made = Ray().recorder()
    made.report_by(stuck.wait)
    for value in range(10):
        made.set(metrics.QUEUE_DEPTH, value, stage="x")
    assert len(made._pending) <= 3
    stuck.set()


def test_a_stages_time_is_measured_also_where_it_fails() -> None:
    fake = FakeRecorder()
    with pytest.raises(ZeroDivisionError), stage_seconds(fake, "encoder"):
        raise ZeroDivisionError
    assert len(fake.observed["blip2_stage_duration_seconds", "encoder"]) == 1
