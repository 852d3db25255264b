"""The simulator: nothing is lost, everything repeats, queues behave as theory says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadtest.simulation.profile import Configs, EngineProfile, PoolProfile, Profile
from loadtest.simulation.run import STAGES, Simulation, own_policy
from loadtest.simulation.traces import Trace, steady, step

CPU = Profile.load("cpu")
SHORT = step("step", 0.5, 2, at=20, until=80, end=120, seed=1)


def default_policy(**others: float) -> Configs:
    """Serve's, with targets of a sixth of what fills a replica."""
    targets = {"preprocessor": 0.35, "encoder": 1.35, "generator": 10.5}
    return {
        stage: {
            "target_ongoing_requests": target,
            "metrics_interval_s": 2,
            "look_back_period_s": 10,
            "upscale_delay_s": 2,
            "downscale_delay_s": 60,
            **others,
        }
        for stage, target in targets.items()
    }


@pytest.mark.parametrize(
    "configs",
    [
        pytest.param({}, id="a fixed number of replicas"),
        pytest.param(default_policy(), id="Serve's policy"),
        pytest.param(own_policy(), id="the own policy"),
    ],
)
@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_all_that_arrive_end(profile: str, configs: Configs) -> None:
    loaded = Profile.load(profile)
    trace = replace(SHORT, load=lambda t: SHORT.load(t) / 4, duration_s=60)
    arrived = sum(1 for _ in trace.arrivals(loaded.generator.capacity))

    simulation = Simulation(loaded, trace, configs)
    simulation.run()

    assert simulation.ended == arrived
    assert [pool.passed for pool in simulation.pools.values()] == [arrived] * 3
    assert not any(pool.ongoing or pool.queue for pool in simulation.pools.values())


def test_a_simulation_repeats_and_another_seed_differs() -> None:
    def outcome(seed: int) -> object:
        return Simulation(CPU, replace(SHORT, seed=seed), own_policy()).run()

    assert outcome(1) == outcome(1)
    assert outcome(1) != outcome(2)


def test_one_server_with_constant_service_times_has_the_queue_of_m_d_1() -> None:
    """Pollaczek and Khinchine: requests in the system, rho + rho^2 / (2 (1 - rho))."""
    service_s, rho = 0.02, 0.8
    server = PoolProfile((0.0, service_s), threads=1, varies=False, start_s=1, cost=1)
    profile = replace(CPU, stages={**CPU.stages, "preprocessor": server})
    load = rho / service_s / profile.generator.capacity
    simulation = Simulation(profile, steady("m/d/1", load, 3000, seed=3), {}, stages=STAGES[:1])
    pool = simulation.pools["preprocessor"]
    pool.set_target(1)  # more were made for the load
    waited: list[float] = []
    pool._pass_on = lambda request: waited.append(simulation.events.now - request.arrived)

    simulation.run()

    mean_s = sum(waited) / len(waited)
    assert mean_s == pytest.approx(service_s * (1 + rho / (2 * (1 - rho))), rel=0.05)


def test_a_lone_request_takes_its_prompt_and_its_steps() -> None:
    engine = EngineProfile((0.008, 0.01, 0.012), 0.02, 45, 32, 1000, 100, start_s=1, cost=1)
    profile = replace(CPU, stages={**CPU.stages, "generator": engine})
    trace = Trace("few", 500, lambda _: 0.0005, seed=2)
    simulation = Simulation(profile, trace, {}, stages=["generator"])
    times: list[tuple[float, int]] = []
    simulation.pools["generator"]._pass_on = lambda request: times.append(
        (simulation.events.now - request.arrived, request.answer_tokens)
    )

    simulation.run()

    assert times
    assert [took for took, _ in times] == pytest.approx([0.02 + n * 0.01 for _, n in times])


def test_a_full_generator_makes_the_requests_that_its_profile_says() -> None:
    trace = steady("too much", 1.3, 200, seed=4)
    simulation = Simulation(CPU, trace, {}, stages=["generator"])
    pool = simulation.pools["generator"]
    pool.set_target(1)
    simulation.events.run(0)
    ended_at: list[float] = []
    pool._pass_on = lambda _: ended_at.append(simulation.events.now)

    simulation.run()

    busy = [time for time in ended_at if 60 <= time < 300]
    assert len(busy) / 240 == pytest.approx(CPU.generator.capacity, rel=0.05)


def test_replicas_that_are_stopped_finish_what_they_have() -> None:
    trace = step("down", 3, 0.5, at=20, until=200, end=200, seed=5)
    simulation = Simulation(CPU, trace, own_policy())

    outcome = simulation.run()

    targets = [target for _, target in simulation.pools["generator"].changes]
    assert targets[-1] < max(targets)
    assert simulation.ended == sum(simulation._all)
    assert all(hours > 0 for hours in outcome.replica_hours.values())


def test_the_own_policy_recovers_from_a_step_before_serves_and_costs_no_more() -> None:
    trace = step("step", 1, 6, at=20, until=200, end=300, seed=6)
    own, default = (
        Simulation(CPU, trace, configs).run() for configs in (own_policy(), default_policy())
    )

    assert own.missed_s < default.missed_s
    assert own.late_share < default.late_share
    assert own.cost_hours <= default.cost_hours
    assert own.flaps <= default.flaps


def test_signals_are_recorded_for_each_decision() -> None:
    recording: dict[str, list[object]] = {}
    Simulation(CPU, SHORT, own_policy(), recording=recording).run()  # type: ignore[arg-type]

    assert set(recording) == set(STAGES)
    assert all(len(stages) >= 240 for stages in recording.values())
