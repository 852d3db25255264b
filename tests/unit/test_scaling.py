"""The policy as a function: from what replicas report to how many replicas there should be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip2_serve.config import GeneratorConfig
from blip2_serve.scaling import (
    Bursts,
    Settings,
    Signals,
    Stage,
    StagePolicy,
    Trend,
    desired_replicas,
    replicas_needed,
)
from blip2_serve.stage_config import ScalingConfig

SETTINGS = Settings(
    target_utilization=0.5,
    headroom=0,
    burst_headroom=2,
    backlog_drain_s=10,
    max_surge=5,
    downscale_margin=0.2,
    target_occupancy=0.8,
    max_step_s=0.1,
    initial_ongoing_requests=4,
)


def stage(*replicas: Signals, **others: Any) -> Stage:
    """A stage that runs its target of replicas, has work, and may have 100 replicas."""
    values = {
        "running": len(replicas),
        "target": len(replicas),
        "ongoing": 1.0,
        "max_replicas": 100,
    }
    return Stage(replicas, **{**values, **others})


def busy(finished: float, **others: Any) -> Signals:
    return Signals(finished=finished, capacity=10.0, **others)


@pytest.mark.parametrize(
    ("now", "wanted"),
    [
        pytest.param(stage(busy(5), busy(5)), 2, id="at the target utilization: no change"),
        pytest.param(
            stage(busy(5, refused=35), busy(5, refused=35)), 16, id="what was refused is load, too"
        ),
        pytest.param(
            stage(busy(10), busy(10)), 4, id="at twice the target utilization: twice as many"
        ),
        pytest.param(stage(busy(2), busy(2)), 1, id="one is enough, with margin: one"),
        pytest.param(stage(busy(2.3), busy(2.3)), 2, id="one is barely enough: both stay"),
        pytest.param(stage(busy(5), growth=12), 4, id="growth of the ongoing requests is load"),
        pytest.param(stage(busy(9), growth=-6), 1, id="a shrinking backlog is not load"),
        pytest.param(stage(busy(2), growth=-6), 1, id="a negative load is none"),
        pytest.param(
            stage(busy(5, waiting=250)), 3, id="a backlog at replicas is drained in ten seconds"
        ),
        pytest.param(stage(busy(5), queued=9999), 3, id="but max_surge bounds the drain"),
        pytest.param(
            stage(busy(10), growth=-10, queued=200),
            2,
            id="a backlog is drained even if nothing arrives",
        ),
        pytest.param(stage(busy(5), queued=250), 3, id="a backlog at callers is drained too"),
        pytest.param(
            stage(busy(9), Signals(finished=1)),
            2,
            id="a new replica without capacity counts as the others",
        ),
        pytest.param(
            stage(busy(9), Signals(0, 0, 30.0)),
            2,
            id="one of mean capacity is barely enough: both stay",
        ),
        pytest.param(
            stage(busy(10), running=3, target=3), 3, id="replicas that have not reported yet stay"
        ),
        pytest.param(
            stage(busy(5), target=2, running=1, queued=100),
            2,
            id="starting replicas count as there",
        ),
        pytest.param(
            stage(busy(10), busy(0), target=2), 2, id="one of three was lost: two are enough"
        ),
    ],
)
def test_replicas_follow_the_offered_load(now: Stage, wanted: int) -> None:
    assert desired_replicas(now, SETTINGS) == wanted


@pytest.mark.parametrize(
    ("replicas", "needed"),
    [
        pytest.param([busy(5, start_s=8)], 1 + 0.2, id="half a replica's load, 8 s to start"),
        pytest.param(
            [busy(5, start_s=32)], 1 + 0.4, id="4 times as long to start: twice the headroom"
        ),
        pytest.param(
            [busy(10, start_s=8)] * 4, 8 + 0.2 * 8**0.5, id="8 times the load: less than thrice"
        ),
        pytest.param(
            [busy(5, start_s=7), busy(5, start_s=11)], 2 + 0.3, id="the mean start-up time counts"
        ),
        pytest.param(
            [busy(5, start_s=8), busy(0)], 1 + 0.2, id="one replica reports no start-up time"
        ),
        pytest.param([busy(5)], 1, id="no replica reports one"),
        pytest.param([busy(0, start_s=16)], 0, id="no load needs no headroom"),
    ],
)
def test_headroom_grows_with_start_up_time_and_load(replicas: list[Signals], needed: float) -> None:
    settings = replace(SETTINGS, headroom=0.1)

    assert replicas_needed(stage(*replicas), settings) == pytest.approx(needed)


def test_a_bursty_load_gets_more_headroom() -> None:
    settings = replace(SETTINGS, headroom=0.1, burst_headroom=1.5)
    calm = stage(busy(5, start_s=8))

    assert replicas_needed(calm, settings) == pytest.approx(1 + 0.2)
    assert replicas_needed(replace(calm, bursty=True), settings) == pytest.approx(1 + 0.3)


@pytest.mark.parametrize(
    ("loads", "bursty"),
    [
        pytest.param([2], False, id="a steady load"),
        pytest.param([2, 8], False, id="a step"),
        pytest.param([2, 8, 2], False, id="a spike"),
        pytest.param([2, 8, 2, 8], True, id="a spike again"),
        pytest.param([2, 8, 2, 8, 2], True, id="two spikes, both over"),
        pytest.param([2, 4, 6, 8], False, id="a rise in steps, never a fall"),
        pytest.param([2, 2.9, 2, 2.9, 2, 2.9], False, id="wavering by less than 30% plus 0.6"),
        pytest.param([0.2, 0.7, 0.2, 0.7], False, id="a small load may double"),
        pytest.param([2, 8, 2, 8, *[2] * 7], False, id="a second spike seven minutes ago"),
    ],
)
def test_a_load_is_bursty_after_a_second_surge(loads: list[float], bursty: bool) -> None:
    """Each load lasts 70 s; a surge is forgotten after 480 s."""
    bursts = Bursts()
    seen = [bursts.update(float(second), loads[second // 70]) for second in range(70 * len(loads))]
    assert seen[-1] is bursty


def test_surges_close_together_are_one() -> None:
    bursts = Bursts()
    assert not any(
        bursts.update(float(second), 8 if second % 20 > 9 else 2) for second in range(60)
    )


@pytest.mark.parametrize(
    ("replica", "needed"),
    [
        pytest.param(busy(1, occupancy=1.0), 1.25, id="all sequences or KV slots in use"),
        pytest.param(busy(1, occupancy=0.4), 0.5, id="half of the target occupancy"),
        pytest.param(
            busy(1, step_s=0.19, fixed_step_s=0.01),
            2,
            id="steps twice as much over their fixed part as allowed",
        ),
        pytest.param(busy(1, step_s=0.1, fixed_step_s=0.01), 1, id="steps at their limit"),
        pytest.param(
            busy(1, step_s=0.3, fixed_step_s=0.2),
            0.2,
            id="steps above their limit with any number of replicas",
        ),
    ],
)
def test_a_crowded_generator_spreads_over_more_replicas(replica: Signals, needed: float) -> None:
    assert replicas_needed(stage(replica), SETTINGS) == pytest.approx(needed)


def test_without_a_limit_steps_may_take_any_time() -> None:
    settings = replace(SETTINGS, max_step_s=None)
    slow = busy(1, step_s=5.0, fixed_step_s=0.01)

    assert replicas_needed(stage(slow), settings) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("now", "wanted"),
    [
        pytest.param(stage(running=2, target=2, ongoing=20), 5, id="nothing is reported"),
        pytest.param(stage(Signals(finished=3), ongoing=12), 3, id="no capacity is known"),
        pytest.param(stage(Signals(0, 0, 0.0), ongoing=12), 3, id="a capacity of zero"),
        pytest.param(
            stage(running=2, target=2, ongoing=0),
            1,
            id="nothing is reported and there are no requests",
        ),
    ],
)
def test_without_a_measured_capacity_ongoing_requests_decide(now: Stage, wanted: int) -> None:
    assert desired_replicas(now, SETTINGS) == wanted


@pytest.mark.parametrize(
    ("now", "wanted"),
    [
        pytest.param(stage(busy(0), busy(0), ongoing=0), 1, id="one stays by default"),
        pytest.param(stage(busy(0), ongoing=0, min_replicas=0), 0, id="none, if min_replicas is 0"),
        pytest.param(
            stage(busy(0), ongoing=0.1, min_replicas=0), 1, id="but one while there are requests"
        ),
        pytest.param(
            stage(busy(0.01), ongoing=0, min_replicas=0),
            1,
            id="and one right after the last request",
        ),
        pytest.param(stage(busy(0), ongoing=0, min_replicas=3), 3, id="the lower bound holds"),
        pytest.param(stage(busy(1000), max_replicas=7), 7, id="the upper bound holds"),
        pytest.param(
            stage(running=0, target=0, ongoing=0, min_replicas=0),
            0,
            id="no replicas and no requests",
        ),
        pytest.param(
            stage(running=0, target=3, ongoing=9), 3, id="all replicas are starting: wait for them"
        ),
    ],
)
def test_bounds_hold(now: Stage, wanted: int) -> None:
    assert desired_replicas(now, SETTINGS) == wanted


rates = st.floats(0, 1e4)
replicas = st.builds(
    Signals,
    finished=rates,
    waiting=rates,
    capacity=st.just(10.0),
    start_s=st.none() | st.floats(0, 600),
    occupancy=st.none() | st.floats(0, 1),
    step_s=st.none() | st.floats(0, 10),
    fixed_step_s=st.none() | st.floats(0, 10),
)
stages = st.builds(
    lambda reported, starting, target, ongoing, queued: Stage(
        tuple(reported),
        len(reported) + starting,
        target,
        ongoing,
        queued,
        min_replicas=1,
        max_replicas=10_000,
    ),
    st.lists(replicas, max_size=5),
    st.integers(0, 3),
    st.integers(0, 50),
    rates,
    rates,
)


WITH_HEADROOM = replace(SETTINGS, headroom=0.5)


@given(stages)
def test_the_number_stays_within_bounds(now: Stage) -> None:
    assert 1 <= desired_replicas(now, WITH_HEADROOM) <= 10_000


@given(stages, st.floats(1, 10))
def test_more_load_never_means_fewer_replicas(now: Stage, factor: float) -> None:
    more = replace(
        now,
        replicas=tuple(
            replace(r, finished=factor * r.finished, waiting=factor * r.waiting)
            for r in now.replicas
        ),
        ongoing=factor * now.ongoing,
        queued=factor * now.queued,
    )

    assert desired_replicas(more, WITH_HEADROOM) >= desired_replicas(now, WITH_HEADROOM)


@given(stages)
def test_a_decision_is_stable_under_the_same_load(now: Stage) -> None:
    decided = desired_replicas(now, WITH_HEADROOM)

    assert desired_replicas(replace(now, target=decided), WITH_HEADROOM) == decided


@given(st.integers(1, 90), st.floats(0, 0.19))
def test_a_load_that_wavers_within_the_margin_changes_nothing(target: int, share: float) -> None:
    """One replica should get 5 requests per second."""
    now = stage(busy(5 * target * (1 - 1e-6) / (1 + share)), running=1, target=target)

    assert desired_replicas(now, SETTINGS) == target


RECORDED = json.loads((Path(__file__).parent / "autoscaling_step.json").read_text())


def recorded(entry: dict[str, Any]) -> Stage:
    return Stage(**{**entry, "replicas": tuple(Signals(**r) for r in entry["replicas"])})


def test_a_recorded_step_of_load_is_followed_at_once_without_overshoot() -> None:
    """A generator's signals: the load goes from 1.5 to 6 replicas at 45 s, and back at 300 s."""
    settings = Settings(**GeneratorConfig().scaling.model_dump())
    decided = {
        moment["second"]: desired_replicas(recorded(moment["stage"]), settings)
        for moment in RECORDED
    }
    start_s = RECORDED[0]["stage"]["replicas"][0]["start_s"]

    def enough(load: float) -> float:
        headroom = settings.headroom * (load * start_s) ** 0.5
        return min(
            load / settings.target_utilization + headroom, RECORDED[0]["stage"]["max_replicas"]
        )

    few, full = enough(1.5), enough(6)

    def between(first: float, last: float) -> list[int]:
        return [count for second, count in decided.items() if first <= second < last]

    assert few - 1 <= min(between(-30, 45)) <= max(between(-30, 45)) <= few + 2
    assert max(between(45, 60)) >= 6
    assert full - 1 <= min(between(150, 300)) <= max(between(150, 300)) <= full + 1
    assert few - 2 <= min(between(360, 450)) <= max(between(360, 450)) <= few + 2


def context(**others: Any) -> Any:
    """The part of Serve's AutoscalingContext that the policy reads."""
    values = {
        "aggregated_metrics": {},
        "running_replicas": ["a", "b"],
        "current_num_replicas": 2,
        "target_num_replicas": 2,
        "total_num_requests": 1.0,
        "total_queued_requests": 0.0,
        "capacity_adjusted_min_replicas": 1,
        "capacity_adjusted_max_replicas": 9,
        "current_time": 100.0,
        "config": SimpleNamespace(metrics_interval_s=2),
    }
    return SimpleNamespace(**{**values, **others})


@pytest.mark.parametrize(
    ("ctx", "wanted"),
    [
        pytest.param(
            context(
                aggregated_metrics={
                    "finished": {"a": 10.0, "b": 10.0},
                    "waiting": {"a": 0.0, "b": 0.0},
                    "capacity": {"a": 10.0, "b": 10.0},
                }
            ),
            4,
            id="both report",
        ),
        pytest.param(
            context(
                aggregated_metrics={
                    "finished": {"a": 10.0, "b": 10.0},
                    "capacity": {"a": 10.0},
                    "ongoing": {"a": 3.0},
                }
            ),
            4,
            id="one knows no capacity yet; Serve adds a metric of its own",
        ),
        pytest.param(
            context(
                aggregated_metrics={"finished": {"gone": 99.0, "a": 5.0}, "capacity": {"a": 9}}
            ),
            2,
            id="the report of a replica that is gone is ignored",
        ),
        pytest.param(context(total_num_requests=20.0), 5, id="nothing is reported"),
        pytest.param(context(aggregated_metrics=None), 1, id="no metrics at all"),
    ],
)
def test_the_policy_reads_serves_context(ctx: Any, wanted: int) -> None:
    settings = {name: getattr(SETTINGS, name) for name in ScalingConfig().model_dump()}

    assert StagePolicy(**settings)(ctx) == (wanted, {})


def test_the_policy_adds_headroom_after_bursts() -> None:
    """A load of 2 and 8 s to start: headroom is 0.5 * sqrt(2 * 8) = 2, and doubles after bursts."""
    settings = {name: getattr(SETTINGS, name) for name in ScalingConfig().model_dump()}
    policy = StagePolicy(
        **{**settings, "headroom": 0.5, "downscale_margin": 0, "target_utilization": 1}
    )

    def wanted(minute: int, load: float) -> int:
        metrics = {"finished": {"a": 10 * load}, "capacity": {"a": 10.0}, "start_s": {"a": 8.0}}
        now = context(
            aggregated_metrics=metrics,
            running_replicas=["a"],
            current_time=60.0 * minute,
            capacity_adjusted_max_replicas=90,
        )
        return policy(now)[0]

    assert [wanted(*now) for now in enumerate([2, 2, 6, 2, 6, 2])] == [4, 4, 10, 4, 13, 6]


def test_the_policy_counts_growth_of_the_ongoing_requests() -> None:
    settings = {name: getattr(SETTINGS, name) for name in ScalingConfig().model_dump()}
    policy = StagePolicy(**settings)
    metrics = {"finished": {"a": 10.0}, "capacity": {"a": 10.0}}
    wanted = [
        policy(
            context(
                aggregated_metrics=metrics,
                running_replicas=["a"],
                current_num_replicas=1,
                target_num_replicas=1,
                current_time=float(second),
                total_num_requests=10.0 * second,
            )
        )[0]
        for second in range(100, 110)
    ]

    assert wanted == [2, 2, *[4] * 8]  # 10 per second finish, and 10 more arrive


@pytest.mark.parametrize(
    ("numbers", "growth"),
    [
        pytest.param([(0, 5.0)], 0, id="seen once"),
        pytest.param([(0, 5.0), (1, 50.0)], 0, id="not seen for long enough"),
        pytest.param([(0, 5.0), (2, 6.0), (4, 13.0)], 2, id="over the whole window"),
        pytest.param(
            [(0, 99.0), (1, 5.0), (3, 5.0), (5, 13.0)], 2, id="older numbers do not count"
        ),
        pytest.param([(0, 13.0), (4, 5.0)], -2, id="shrinking"),
        pytest.param([(0, 5.0), (100, 105.0)], 1, id="over a gap"),
    ],
)
def test_a_trend_is_the_growth_over_its_window(
    numbers: list[tuple[float, float]], growth: float
) -> None:
    trend = Trend()

    assert [trend.growth(now, number, 4) for now, number in numbers][-1] == growth


def test_unknown_signals_are_not_reported() -> None:
    assert Signals(1.5, 2).report() == {"finished": 1.5, "waiting": 2, "refused": 0.0}
