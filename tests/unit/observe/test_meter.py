"""The meters of replicas: rates between readings, costs of steps, capacity."""

from __future__ import annotations

import random

import pytest

from blip2_serve.observe.meter import (
    BatchMeter,
    Deltas,
    EngineMeter,
    RecentMean,
    RecentRate,
    StepCost,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_deltas_are_what_totals_grew_by_between_readings() -> None:
    clock = Clock()
    deltas = Deltas(clock)
    clock.now += 2

    assert deltas.read(images=10) == (2, {"images": 10})

    clock.now += 4
    assert deltas.read(images=12, steps=3) == (4, {"images": 2, "steps": 3})


def test_a_recent_mean_forgets_old_items() -> None:
    mean = RecentMean(memory=50)
    assert mean.value is None

    mean.add(total=100, items=10)
    assert mean.value == pytest.approx(10)

    mean.add(total=500 * 30, items=500)
    assert mean.value == pytest.approx(30, rel=0.01)


def test_no_items_leave_a_recent_mean_unknown() -> None:
    mean = RecentMean()
    mean.add(total=0, items=0)
    assert mean.value is None


def test_a_recent_rate_is_that_of_the_last_readings() -> None:
    clock = Clock()
    rate = RecentRate(readings=3, clock=clock)
    assert rate.per_s == 0
    rates = []
    for total in (10, 20, 30, 30, 30, 30):
        clock.now += 2
        rate.note(total)
        rates.append(rate.per_s)
    assert rates == [5, 5, 5, pytest.approx(20 / 6), pytest.approx(10 / 6), 0]


@pytest.mark.parametrize(
    ("fixed", "per_item"),
    [
        pytest.param(0.008, 0.0006, id="both"),
        pytest.param(0.0, 0.02, id="proportional to the size"),
        pytest.param(0.01, 0.0, id="the same for every size"),
    ],
)
def test_the_cost_of_a_step_is_found_from_steps_of_many_sizes(
    fixed: float, per_item: float
) -> None:
    rng = random.Random(0)
    cost = StepCost()
    for _ in range(2000):
        items = rng.randint(1, 64)
        cost.add(items, (fixed + per_item * items) * rng.uniform(0.9, 1.1))

    assert cost.seconds(64) == pytest.approx(fixed + 64 * per_item, rel=0.05)
    assert cost.fixed_and_per_item == pytest.approx((fixed, per_item), rel=0.2, abs=5e-4)


def test_steps_of_one_size_promise_no_gain_from_larger_steps() -> None:
    cost = StepCost()
    assert not cost.known
    for seconds in (0.02, 0.04):
        cost.add(2, seconds)

    assert cost.known
    assert cost.seconds(8) == pytest.approx(4 * 0.03, rel=0.01)


def test_a_step_cost_is_never_negative_even_if_larger_steps_were_faster() -> None:
    cost = StepCost()
    for items, seconds in ((1, 0.04), (8, 0.02), (4, 0.03)):
        cost.add(items, seconds)

    fixed, per_item = cost.fixed_and_per_item
    assert fixed >= 0
    assert per_item == 0


def test_a_change_of_speed_is_noticed() -> None:
    cost = StepCost(memory=100)
    for seconds in [0.01] * 1000 + [0.03] * 1000:
        cost.add(1, seconds)

    assert cost.seconds(1) == pytest.approx(0.03, rel=0.01)


def test_a_batching_replica_reports_its_rate_and_the_rate_of_full_batches() -> None:
    clock = Clock()
    meter = BatchMeter(max_batch_size=8, clock=clock)
    assert meter.signals(0).capacity is None

    for items in (1, 2, 4, 8):
        meter.computed(items, 0.01 + 0.005 * items)
    clock.now += 2
    signals = meter.signals(waiting=5)

    assert (signals.finished, signals.waiting) == (7.5, 5)
    assert signals.capacity == pytest.approx(8 / 0.05, rel=0.01)
    assert (meter.items, meter.batches, meter.seconds) == (15, 4, pytest.approx(0.115))


def test_the_capacity_of_threads_adds_up() -> None:
    meter = BatchMeter(threads=4, clock=Clock())
    meter.computed(1, 0.02)

    assert meter.signals(0).capacity == pytest.approx(4 / 0.02)


def test_readings_in_quick_succession_make_no_huge_rate() -> None:
    meter = BatchMeter(max_batch_size=8, clock=Clock())
    meter.computed(8, 0.1)

    assert meter.signals(0).finished == 8 / 0.5


def test_the_start_up_time_is_the_age_when_ready() -> None:
    age = Clock()
    batches, engine = BatchMeter(clock=Clock(), age=age), EngineMeter(20, Clock(), age)
    assert batches.signals(0).start_s is None

    age.now = 8.0
    batches.ready()
    engine.ready()
    age.now = 50.0

    assert batches.signals(0).start_s == engine.signals(0, 0, 0).start_s == 8.0


def engine_meter(clock: Clock) -> EngineMeter:
    """Ten requests of 40 prompt and 20 answer tokens; a step takes 10 ms plus 1 ms per token."""
    meter = EngineMeter(max_num_seqs=20, clock=clock)
    for _ in range(10):
        meter.arrived()
        meter.stepped(40, 0.05)
        meter.stepped(2, 0.012, steps=10)
        meter.left(20)
    return meter


def test_a_generator_reports_the_rate_that_all_its_sequences_allow() -> None:
    clock = Clock()
    meter = engine_meter(clock)
    for _ in range(3):
        meter.arrived()
    clock.now += 5
    signals = meter.signals(running=5, waiting=3, kv_share=0.1)

    assert (signals.finished, signals.waiting) == (2, pytest.approx(3 + 2.5, abs=0.1))
    # 20 answer tokens in steps shared by 20 sequences, and 60 tokens of its own.
    assert signals.capacity == pytest.approx(1 / (20 * 0.010 / 20 + 60 * 0.001), rel=0.01)
    assert signals.occupancy == pytest.approx(5 / 20)
    assert signals.fixed_step_s == pytest.approx(0.010, rel=0.01)
    assert signals.step_s == pytest.approx((0.05 + 10 * 0.012) / 11)


@pytest.mark.parametrize(
    ("running", "surplus"),
    [
        pytest.param(0, 0, id="nothing runs"),
        pytest.param(2, 0, id="as many as run at half of the capacity"),
        pytest.param(20, 17.5, id="as many as can run"),
    ],
)
def test_sequences_that_slow_each_other_down_count_as_waiting(running: int, surplus: float) -> None:
    """At half of 14.3 requests/s, a request has 140 ms: 60 for its tokens, 80 of its steps' 200."""
    meter = engine_meter(Clock())
    signals = meter.signals(running=running, waiting=0, kv_share=running / 20)

    assert signals.waiting == pytest.approx(surplus, abs=0.1)


def test_a_full_kv_limits_the_sequences_that_capacity_counts() -> None:
    clock = Clock()
    meter = engine_meter(clock)
    clock.now += 5
    signals = meter.signals(running=5, waiting=0, kv_share=0.5)  # ten sequences would fill it

    assert signals.occupancy == pytest.approx(0.5)
    assert signals.capacity == pytest.approx(1 / (20 * 0.010 / 10 + 60 * 0.001), rel=0.01)


def test_an_idle_generator_keeps_its_capacity_and_reports_no_steps() -> None:
    clock = Clock()
    meter = engine_meter(clock)
    before = meter.signals(running=0, waiting=0, kv_share=0)
    clock.now += 60
    idle = meter.signals(running=0, waiting=0, kv_share=0)

    assert (idle.finished, idle.occupancy, idle.step_s) == (0, 0, None)
    assert idle.capacity == before.capacity


def test_running_requests_do_not_make_finished_ones_seem_costlier() -> None:
    """60 more requests are through their prompts and half of their answers."""
    meter = engine_meter(Clock())
    before = meter.signals(running=0, waiting=0, kv_share=0).capacity
    for _ in range(60):
        meter.arrived()
        meter.stepped(40, 0.05)
        meter.stepped(2, 0.012, steps=5)
    after = meter.signals(running=60, waiting=0, kv_share=0).capacity

    assert before is not None
    assert after == pytest.approx(before, rel=0.2)


def test_refused_requests_count_as_finished_and_cost_nothing() -> None:
    clock = Clock()
    meter = engine_meter(clock)
    before = meter.signals(running=0, waiting=0, kv_share=0).capacity
    for _ in range(20):
        meter.arrived()
        meter.left(0)
    clock.now += 2
    after = meter.signals(running=0, waiting=0, kv_share=0)

    assert after.finished == 10
    assert after.capacity == before


def test_a_generator_that_has_finished_nothing_knows_no_capacity() -> None:
    meter = EngineMeter(max_num_seqs=20, clock=Clock())
    meter.stepped(40, 0.05)

    assert meter.signals(running=1, waiting=0, kv_share=0).capacity is None
