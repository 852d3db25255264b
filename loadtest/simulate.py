"""Autoscaling policies against simulated load.

    PYTHONPATH=serve:loadtest python loadtest/simulate.py tune cpu gpu
    PYTHONPATH=serve:loadtest python loadtest/simulate.py compare cpu gpu
    PYTHONPATH=serve:loadtest python loadtest/simulate.py loose cpu
    PYTHONPATH=serve:loadtest python loadtest/simulate.py thousand cpu
    PYTHONPATH=serve:loadtest python loadtest/simulate.py record cpu

`tune` searches the best settings of Serve's default policy on training traces; `compare` lets
them and this project's policy loose on other traces, and writes results, plot and the table of
README.md. `loose` does so with bounds that bind nobody. `thousand` takes some minutes: a thousand
replicas, request by request. `record` writes the signals that the policy's unit test replays.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blip2_serve.scaling import Stage
from simulation.profile import Profile
from simulation.report import DEFAULT, OWN, plot, table, totals, write_section
from simulation.run import STAGES, Outcome, Simulation
from simulation.traces import WARM_UP_S, compared, thousand, training
from simulation.tuning import LATE_COSTS, Config, alone, own_policy, together

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "simulation" / "results"
RECORDED = FOLDER.parent / "tests" / "unit" / "autoscaling_step.json"


def main() -> None:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("command", choices=[*COMMANDS])
    parser.add_argument("profiles", nargs="+", help="names of simulation/profiles, or files")
    arguments = parser.parse_args()
    for name in arguments.profiles:
        profile = Profile.load(name)
        COMMANDS[arguments.command](profile)


def tune(profile: Profile) -> None:
    """Serve's default policy for each price of lateness."""
    found = {}
    for stage in STAGES:
        found[stage] = alone(profile, stage)
        print(f"{profile.name} {stage}: {len(found[stage])} configurations", flush=True)
    chosen = {}
    for late_costs in LATE_COSTS:
        chosen[_default_name(late_costs)] = together(profile, found, late_costs)
        print(f"{profile.name} {late_costs:.0f}: {chosen[_default_name(late_costs)]}", flush=True)
    tried = {stage: [asdict(one) for one in ones] for stage, ones in found.items()}
    _write(f"{profile.name}-tuned", {"chosen": chosen, "alone": tried})


def compare(profile: Profile) -> None:
    """All traces, all policies; then the table and the plot of all profiles compared so far."""
    results = [
        run(profile, index, name, configs)
        for index in range(len(compared()))
        for name, configs in policies(profile).items()
    ]
    _write(f"{profile.name}-compared", results)
    report()


def compare_loose(profile: Profile) -> None:
    """All traces, and as many replicas as a policy wants."""
    results = [
        run(profile, index, name, {s: {**c, "max_replicas": 1000} for s, c in configs.items()})
        for index in range(len(compared()))
        for name, configs in policies(profile).items()
        if name in (OWN, DEFAULT)
    ]
    _write(f"{profile.name}-loose", results)
    report()


def run_thousand(profile: Profile) -> None:
    names = (OWN, DEFAULT)
    _write(
        f"{profile.name}-thousand",
        [run(profile, None, name, policies(profile)[name]) for name in names],
    )


def record(profile: Profile) -> None:
    """A generator's signals on the first training trace, every other second."""
    recording: dict[str, list[Stage]] = {}
    Simulation(profile, training()[0], own_policy(), recording=recording).run()
    moments = [
        {"second": second - WARM_UP_S, "stage": asdict(stage)}
        for second, stage in enumerate(recording["generator"])
        if second % 2 == 0 and second >= 60
    ]
    text = json.dumps(moments, default=float)
    rounded = json.loads(text, parse_float=lambda number: round(float(number), 4))
    lines = ",\n".join(json.dumps(moment, separators=(",", ":")) for moment in rounded)
    RECORDED.write_text(f"[\n{lines}\n]\n")


def policies(profile: Profile) -> dict[str, dict[str, Config]]:
    """The own one as it is by default; Serve's, tuned for three tastes."""
    tuned = json.loads((RESULTS / f"{profile.name}-tuned.json").read_text())
    return {OWN: own_policy(), **tuned["chosen"]}


def run(
    profile: Profile, trace_index: int | None, policy: str, configs: dict[str, Config]
) -> dict[str, Any]:
    """One policy on one trace of `compared`, or on the large one."""
    trace = thousand() if trace_index is None else compared()[trace_index]
    simulation = Simulation(profile, trace, configs)
    started = time.perf_counter()
    outcome: Outcome = simulation.run()
    took_s = time.perf_counter() - started
    print(
        f"{profile.name} {trace.name:22} {policy:12} late {outcome.late_share:7.3%}, missed "
        f"{outcome.missed_s:4.0f} s, {outcome.cost_hours:6.2f} h, {outcome.flaps} flaps, "
        f"{outcome.most_replicas} replicas, took {took_s:.1f} s",
        flush=True,
    )
    return {
        "trace": trace.name,
        "kind": trace.kind,
        "policy": policy,
        "took_s": round(took_s, 1),
        **asdict(outcome),
        "series": asdict(simulation.series),
        "load": [trace.load(max(0.0, second)) for second in simulation.series.seconds],
    }


def report() -> None:
    """From the results that are there: plot and table."""
    every = {
        path.stem: json.loads(path.read_text())
        for path in sorted([*RESULTS.glob("*-compared.json"), *RESULTS.glob("*-loose.json")])
    }
    results = {
        name.removesuffix("-compared"): runs
        for name, runs in every.items()
        if name.endswith("-compared")
    }
    plot(results, RESULTS / "autoscaling.png")
    write_section(FOLDER / "README.md", f"{totals(every)}\n\n{table(results)}")


def _default_name(late_costs: float) -> str:
    return f"default/{late_costs:.0f}"


def _write(name: str, values: Any) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(values) + "\n")


COMMANDS = {
    "tune": tune,
    "compare": compare,
    "loose": compare_loose,
    "thousand": run_thousand,
    "record": record,
}

if __name__ == "__main__":
    main()
