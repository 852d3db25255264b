"""Compares autoscaling policies on simulated load.

    python -m loadtest.simulation compare cpu gpu
    python -m loadtest.simulation compare cpu --traces training
    python -m loadtest.simulation record cpu

`compare` runs this project's policy and Serve's default, as tuned in the profile for three prices
of lateness, on traces that no setting was chosen by. It prints two tables and writes the outcomes
to simulation/results/. Choose settings by the training traces only. `record` writes the signals
that the policy's unit test replays.
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
from loadtest.simulation import tables, traces
from loadtest.simulation.profile import Configs, Profile
from loadtest.simulation.run import Simulation, own_policy
from loadtest.simulation.tables import OWN, Run
from loadtest.simulation.traces import WARM_UP_S, Trace

TRACES = {"compared": traces.compared, "training": traces.training}
RESULTS = Path(__file__).parent / "results"
RECORDED = Path(__file__).parents[2] / "tests" / "unit" / "autoscaling_step.json"


def main() -> None:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["compare", "record"])
    parser.add_argument("profiles", nargs="+", help="names in simulation/profiles, or files")
    parser.add_argument("--traces", choices=TRACES, default="compared")
    args = parser.parse_args()
    profiles = [Profile.load(name) for name in args.profiles]
    if args.command == "record":
        record(profiles[0], RECORDED)
        return
    runs = [run for profile in profiles for run in compare(profile, TRACES[args.traces]())]
    if args.traces == "compared":
        for profile in profiles:
            own = [run for run in runs if run["profile"] == profile.name]
            write_lines(RESULTS / f"{profile.name}.json", own)
    print(f"\n{tables.totals(runs)}\n\n{tables.by_trace(runs)}")


def compare(profile: Profile, on: list[Trace]) -> list[Run]:
    """Runs every policy on every trace."""
    policies = {OWN: own_policy(), **profile.default_policies}
    return [run(profile, trace, *policy) for trace in on for policy in policies.items()]


def run(profile: Profile, trace: Trace, policy: str, configs: Configs) -> Run:
    """Runs one policy on one trace, and prints a line."""
    started = time.perf_counter()
    outcome = Simulation(profile, trace, configs).run()
    print(
        f"{profile.name} {trace.name:22} {policy:12} late {outcome.late_share:7.3%}, missed "
        f"{outcome.missed_s:4.0f} s, {outcome.cost_hours:6.2f} h, {outcome.flaps} flaps, "
        f"took {time.perf_counter() - started:.1f} s",
        flush=True,
    )
    return {"profile": profile.name, "trace": trace.name, "policy": policy, **asdict(outcome)}


def record(profile: Profile, path: Path) -> None:
    """Writes a generator's signals on the first training trace, every other second."""
    recording: dict[str, list[Stage]] = {}
    Simulation(profile, traces.training()[0], own_policy(), recording=recording).run()
    moments = [
        {"second": second - WARM_UP_S, "stage": asdict(stage)}
        for second, stage in enumerate(recording["generator"])
        if second % 2 == 0 and second >= 60
    ]
    text = json.dumps(moments, default=float)
    write_lines(path, json.loads(text, parse_float=lambda number: round(float(number), 4)))


def write_lines(path: Path, values: list[Any]) -> None:
    """Writes a JSON array with one element per line."""
    lines = ",\n".join(json.dumps(value, separators=(",", ":")) for value in values)
    path.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
