"""The entry point for locust:

    locust -f loadtest/locustfile.py -H http://127.0.0.1:8000
    locust -f loadtest/locustfile.py -H ... --headless --scenario spike --output results/spike

`--scenario` is a name in scenarios/ or a file. With `--output`, a run leaves its samples, the
server's own figures and a report in that folder, and exits with 1 if it missed an SLO of `--slo`.
Give workers the same options as their master.
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

sys.path.insert(0, str(Path(__file__).parents[1]))  # locust imports this file by its path

from loadtest.load import pictures, report, scenario
from loadtest.load.recording import Recording
from loadtest.load.scenario import Scenario
from loadtest.load.users import REGULARS, Generator, ScenarioShape, Visitor


@events.init_command_line_parser.add_listener
def add_options(parser: ArgumentParser) -> None:
    add: Any = partial(parser.add_argument, include_in_web_ui=False)
    add("--scenario", env_var="LOADTEST_SCENARIO", default="mixed", help="name or YAML file")
    add(
        "--level",
        env_var="LOADTEST_LEVEL",
        type=float,
        help="users or requests per second, in place of the scenario's",
    )
    add("--seconds", env_var="LOADTEST_SECONDS", type=float, help="in place of the scenario's")
    # Strings, not paths: a master sends its options to its workers.
    add("--output", env_var="LOADTEST_OUTPUT", help="folder for samples and report")
    add("--slo", env_var="LOADTEST_SLO", default=str(report.SLO_FILE), help="YAML file of SLOs")


@events.init.add_listener
def prepare(environment: Environment, **_: Any) -> None:
    options: Any = environment.parsed_options
    plan = planned(options)
    output = Path(options.output) if options.output else None
    closed = partial(report.close, slo_file=Path(options.slo))
    recording = Recording(environment, plan, output, closed)
    Visitor.scenario, Visitor.recording = plan, recording
    pictures.draw_all(photographs="photograph" in plan.kinds)
    if plan.arrivals == "closed":
        for user in REGULARS:
            user.weight = plan.weights.get(user.kind, 0)
        environment.user_classes = [user for user in REGULARS if user.weight]
    else:
        environment.user_classes = [Generator]
    if not isinstance(environment.runner, WorkerRunner):
        environment.shape_class = ScenarioShape(plan, recording)
        environment.shape_class.runner = environment.runner


def planned(options: Namespace) -> Scenario:
    """The scenario with the command line's changes."""
    plan = scenario.load(options.scenario)
    changes: dict[str, Any] = {"seconds": options.seconds} if options.seconds else {}
    if options.level and plan.load:
        factor = options.level / plan.load.level
        peak = plan.load.peak and plan.load.peak * factor
        changes["load"] = plan.load.model_copy(update={"level": options.level, "peak": peak})
    return plan.model_copy(update=changes)
