"""Capacity is found by bisection, and plans follow from it."""

from __future__ import annotations

import dataclasses

import pytest

from loadtest.load import capacity
from loadtest.load.capacity import Capacity, Need, bottleneck, highest, per_million, plan
from loadtest.load.server_series import Point

FOUND = Capacity(
    rate=10.0,
    level=8.0,
    missed_at=8.8,
    bottleneck="generator",
    replicas={"preprocessor": 1.0, "encoder": 1.0, "generator": 2.0},
    busy={"preprocessor": 0.2, "encoder": 0.4, "generator": 1.6},
)


@pytest.mark.parametrize("limit", [1.1, 7.3, 50.0])
def test_bisection_ends_within_a_tenth_of_the_limit(limit: float) -> None:
    asked: list[float] = []

    def meets(rate: float) -> bool:
        asked.append(rate)
        return rate <= limit

    low, high = highest(meets, 1, 64)

    assert low <= limit < high <= low * capacity.PRECISION
    assert len(asked) <= 9


def test_bounds_must_enclose_the_limit() -> None:
    with pytest.raises(ValueError, match="lower --low"):
        highest(lambda _: False, 1, 64)
    with pytest.raises(ValueError, match="higher --high"):
        highest(lambda _: True, 1, 64)


def test_the_bottleneck_has_the_longest_queue_in_the_second_half() -> None:
    points = [
        Point(0.0, "queue seconds", "encoder", 9.0),  # a warm-up
        Point(10.0, "queue seconds", "encoder", 0.1),
        Point(10.0, "queue seconds", "generator", 2.0),
    ]
    assert bottleneck(points) == "generator"
    assert bottleneck([]) is None


def test_a_plan_by_hand() -> None:
    needs = plan(FOUND, rate=70, utilization=0.7, gpus={"encoder": 0.5, "generator": 1})

    # The generators were busy for 0.8 of the time and could do no more: 5 requests per second each.
    # The encoder was busy for 0.4, half of that: it could do 20. The preprocessor: 40.
    assert needs == [
        Need("preprocessor", pytest.approx(40.0), 3, 0.0),
        Need("encoder", pytest.approx(20.0), 5, 2.5),
        Need("generator", pytest.approx(5.0), 20, 20.0),
    ]


def test_an_idle_stage_gets_one_replica() -> None:
    idle = dataclasses.replace(FOUND, busy={**FOUND.busy, "encoder": 0.0})

    assert plan(idle, rate=70, utilization=0.7, gpus={})[1].replicas == 1


def test_a_million_requests_by_hand() -> None:
    needs = [Need("encoder", 20.0, 5, 2.5), Need("generator", 5.0, 20, 20.0)]

    cost = per_million(needs, rate=70, gpu_hour=2.0, cpu_hour=0.1, cpus=4)

    # 22.5 GPUs and 100 CPUs cost 45 + 10 per hour, for 252,000 requests.
    assert cost == pytest.approx(55 / 252_000 * 1e6)


def test_a_plan_needs_figures_from_the_server() -> None:
    with pytest.raises(ValueError, match="reported nothing"):
        plan(Capacity(10.0, 8.0, 8.8, None, {}, {}), 70, 0.7, {})
