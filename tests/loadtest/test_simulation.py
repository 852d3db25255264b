"""The simulation loses nothing, repeats itself, and agrees with queueing theory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadtest.results import read_json
from loadtest.simulation.__main__ import RESULTS
from loadtest.simulation.profile import Configs, EngineProfile, PoolProfile, Profile
from loadtest.simulation.run import STAGES, Simulation, own_policy
from loadtest.simulation.tables import DEFAULT, OWN, Run, by_trace, totals
from loadtest.simulation.traces import Trace, compared, steady, step

CPU = Profile.load("cpu")
SHORT = step("step", 0.5, 2, at=20, until=80, end=120, seed=1)


def default_policy(**others: float) -> Configs:
    """Serve's policy, with targets of a sixth of what fills a replica."""
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
def test_every_request_ends(profile: str, configs: Configs) -> None:
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
    """Pollaczek and Khinchine: rho + rho^2 / (2 (1 - rho)) requests in the system on average."""
    service_s, rho = 0.02, 0.8
    server = PoolProfile((0.0, service_s), threads=1, varies=False, start_s=1, cost=1)
    profile = replace(CPU, stages={**CPU.stages, "preprocessor": server})
    load = rho / service_s / profile.generator.capacity
    simulation = Simulation(profile, steady("m/d/1", load, 3000, seed=3), {}, stages=STAGES[:1])
    pool = simulation.pools["preprocessor"]
    pool.set_target(1)  # the load started more
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


def test_a_full_generator_reaches_the_capacity_of_its_profile() -> None:
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


def test_stopped_replicas_finish_their_requests() -> None:
    trace = step("down", 3, 0.5, at=20, until=200, end=200, seed=5)
    simulation = Simulation(CPU, trace, own_policy())

    outcome = simulation.run()

    targets = [target for _, target in simulation.pools["generator"].changes]
    assert targets[-1] < max(targets)
    assert simulation.ended == sum(simulation._all)
    assert all(hours > 0 for hours in outcome.replica_hours.values())


def test_the_own_policy_recovers_from_a_step_sooner_and_costs_no_more() -> None:
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


def test_the_kept_results_cover_every_policy_and_trace() -> None:
    for name in ("cpu", "gpu"):
        runs = read_json(RESULTS / f"{name}.json")
        policies = {OWN, *Profile.load(name).default_policies}
        assert {(run["trace"], run["policy"]) for run in runs} == {
            (trace.name, policy) for trace in compared() for policy in policies
        }


def test_tables_by_hand() -> None:
    def run(trace: str, policy: str, late_share: float, hours: float) -> Run:
        return {
            "profile": "cpu",
            "trace": trace,
            "policy": policy,
            "late_share": late_share,
            "requests": 100,
            "missed_s": 5.0,
            "cost_hours": hours,
            "flaps": 2,
        }

    runs = [run("step", DEFAULT, 0.5, 2), run("step", OWN, 0.1, 1), run("day", OWN, 0.3, 4)]

    assert totals(runs).splitlines()[2:] == [
        f"| cpu | {DEFAULT} | 5 | 50.00% | 2.0 | 2 |",
        f"| cpu | {OWN} | 10 | 20.00% | 5.0 | 4 |",
    ]
    assert by_trace(runs[:2]).splitlines()[2:] == [
        "| cpu | step | 5 → 5 | 50.00% → 10.00% | 2.00 → 1.00 | 2 → 2 |"
    ]
