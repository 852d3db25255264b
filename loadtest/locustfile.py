"""Load tests: users of every kind, as a scenario says.

    locust -f loadtest/locustfile.py -H http://127.0.0.1:8000
    locust -f loadtest/locustfile.py -H ... --headless --scenario spike --output results/spike

`--scenario` is a name in scenarios/ or a file, "mixed" by default. With `--output` a run leaves
samples.csv, run.json, the server's own figures and a report there, is judged by `--slo`, and exits
with 1 if an SLO was missed. Workers take the same options as their master.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from typing import Any

from locust import events
from locust.env import Environment
from locust.runners import WorkerRunner

sys.path.insert(0, str(Path(__file__).parent))

from load import pictures, report, scenario
from load.recording import Recording
from load.scenario import Scenario
from load.shape import ScenarioShape
from load.users import CLOSED, Generator, Visitor


@events.init_command_line_parser.add_listener
def add_options(parser: ArgumentParser) -> None:
    add: Any = partial(parser.add_argument, include_in_web_ui=False)
    add("--scenario", env_var="LOADTEST_SCENARIO", default="mixed")
    add(
        "--level",
        env_var="LOADTEST_LEVEL",
        type=float,
        help="users, or requests a second, instead of the scenario's",
    )
    add("--seconds", env_var="LOADTEST_SECONDS", type=float, help="instead of the scenario's")
    # Text, no paths: a master sends its options to its workers.
    add("--output", env_var="LOADTEST_OUTPUT", help="a folder for samples and report")
    add("--slo", env_var="LOADTEST_SLO", default=str(report.SLO_FILE))


@events.init.add_listener
def prepare(environment: Environment, **_: Any) -> None:
    options: Any = environment.parsed_options
    plan = planned(options)
    output = Path(options.output) if options.output else None
    closing = partial(report.close, slo_file=Path(options.slo))
    recording = Recording(environment, plan, output, closing)
    Visitor.scenario, Visitor.recording = plan, recording
    pictures.draw_all(photographs="photograph" in plan.kinds)
    if plan.arrivals == "closed":
        for kind in CLOSED:
            kind.weight = plan.weights.get(kind.kind, 0)
        environment.user_classes = [kind for kind in CLOSED if kind.weight]
    else:
        environment.user_classes = [Generator]
    if not isinstance(environment.runner, WorkerRunner):
        environment.shape_class = ScenarioShape(plan, recording)
        environment.shape_class.runner = environment.runner


def planned(options: Namespace) -> Scenario:
    """The scenario, with what the command line says instead."""
    plan = scenario.load(options.scenario)
    changes: dict[str, Any] = {"seconds": options.seconds} if options.seconds else {}
    if options.level and plan.load:
        factor = options.level / plan.load.level
        peak = plan.load.peak and plan.load.peak * factor
        changes["load"] = plan.load.model_copy(update={"level": options.level, "peak": peak})
    return plan.model_copy(update=changes)
