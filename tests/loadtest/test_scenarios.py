"""Scenario files, load over time, and arrivals of open loops."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from loadtest.load import arrivals, scenario
from loadtest.load.samples import Sample
from loadtest.load.scenario import Breaking, Load, Scenario

WEIGHTS = {"caption": 3.0, "question": 1.0}


@pytest.mark.parametrize("name", scenario.names())
def test_every_shipped_scenario_is_complete(name: str) -> None:
    plan = scenario.load(name)

    assert plan.kinds
    assert plan.users_at(0) >= 1
    if plan.arrivals == "poisson":
        assert plan.rate_at(0) > 0


def test_the_scenarios_of_the_readme_exist() -> None:
    assert {"mixed", "steady", "ramp", "spike", "day", "soak", "replay"} <= {*scenario.names()}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        pytest.param({"weights": {"captions": 1}}, "no such kind: captions", id="unknown kind"),
        pytest.param({"weights": {}}, "need load and weights", id="no weights"),
        pytest.param({"load": None}, "need load and weights", id="no load"),
        pytest.param({"arrivals": "replay"}, "replay takes a trace", id="replay without a trace"),
        pytest.param({"users": 3}, "Extra inputs", id="unknown key"),
        pytest.param({"load": {"shape": "ramp", "level": 1}}, "need a peak", id="ramp to nowhere"),
        pytest.param({"load": {"level": 1, "peak": 2}}, "steady has none", id="steady to a peak"),
    ],
)
def test_a_wrong_scenario_says_what_is_wrong(changes: dict[str, Any], why: str) -> None:
    right = {"about": "x", "weights": WEIGHTS, "load": {"level": 1}, "seconds": 10}
    Scenario.model_validate(right)

    with pytest.raises(ValueError, match=why):
        Scenario.model_validate({**right, **changes})


def test_an_unknown_scenario_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no scenario 'mixt'; there are .*mixed"):
        scenario.load("mixt")


@pytest.mark.parametrize(
    ("load", "levels"),
    [
        pytest.param(Load(level=4), [4, 4, 4, 4, 4], id="steady"),
        pytest.param(Load(shape="ramp", level=2, peak=10), [2, 4, 6, 8, 10], id="ramp"),
        pytest.param(Load(shape="spike", level=1, peak=10), [1, 1, 10, 1, 1], id="spike"),
        pytest.param(Load(shape="day", level=1, peak=9), [1, 5, 9, 5, 1], id="day"),
    ],
)
def test_levels_over_time(load: Load, levels: list[float]) -> None:
    assert [load.at(share) for share in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(levels)


def test_a_spike_is_ten_times_the_level_in_the_shipped_scenario() -> None:
    load = scenario.load("spike").load
    assert load is not None
    assert load.at(0.5) == 10 * load.at(0.1)


def answers(seconds: float, failures: int = 0, count: int = 40) -> list[Sample]:
    return [
        Sample(i, "caption", "latency", seconds, failure="no" if i < failures else "")
        for i in range(count)
    ]


def test_a_ramp_breaks_when_answers_fail_or_are_late() -> None:
    breaking = Breaking(failures=0.1, latency_p95_s=5)

    assert breaking.why(answers(4.9, failures=4)) == ""
    assert breaking.why(answers(4.9, failures=5)) == "12% of the last requests failed"
    assert breaking.why(answers(5.1)) == "the last requests' p95 was 5.1 s"
    assert breaking.why(answers(60, failures=19, count=19)) == ""  # too few to tell


def drawn(rate_at: Callable[[float], float], seconds: float) -> list[tuple[float, str]]:
    return list(arrivals.poisson(rate_at, seconds, WEIGHTS, random.Random(3)))


def test_poisson_arrivals_have_the_right_rate_kinds_and_gaps() -> None:
    found = drawn(lambda _: 5.0, 2_000)

    times = [at for at, _ in found]
    gaps = [b - a for a, b in pairwise(times)]
    assert len(found) == pytest.approx(10_000, rel=0.05)
    assert times == sorted(times)
    assert times[-1] < 2_000
    assert fmean(kind == "caption" for _, kind in found) == pytest.approx(0.75, abs=0.03)
    # 1 / e of exponential gaps exceed the mean.
    assert fmean(gap > 0.2 for gap in gaps) == pytest.approx(0.368, abs=0.03)


def test_arrivals_follow_a_changing_rate() -> None:
    found = drawn(lambda second: 10.0 if 400 <= second < 600 else 1.0, 1_000)

    inside = sum(400 <= at < 600 for at, _ in found)
    assert inside == pytest.approx(2_000, rel=0.1)
    assert len(found) - inside == pytest.approx(800, rel=0.15)


def test_a_trace_is_read_in_order_of_time(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("seconds,kind\n2.5,caption\n0.5,question\n")

    assert scenario.read_trace(path) == [(0.5, "question"), (2.5, "caption")]


def test_a_trace_with_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("seconds,kind\n2.5,captions\n")

    with pytest.raises(ValueError, match="no such kind: captions"):
        scenario.read_trace(path)
