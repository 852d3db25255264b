"""locust's users, one class for each kind of traffic, and how many of them run at each moment."""

from __future__ import annotations

import itertools
import logging
import random
import time
from pathlib import Path
from typing import Any, ClassVar

from locust import LoadTestShape, User, task
from requests.adapters import HTTPAdapter

from loadtest.load import arrivals, scenario, traffic
from loadtest.load.arrivals import OpenLoop
from loadtest.load.recording import Recording
from loadtest.load.samples import Sample
from loadtest.load.scenario import Scenario
from loadtest.load.traffic import KINDS, Caller

logger = logging.getLogger(__name__)

SPAWN_RATE = 1_000.0  # users per second: all at once
LOOK_BACK_S = 20.0  # when looking for the breaking point
SHIPPED_MODEL = "demo"  # the name under which /v1/models lists the shipped checkpoint

_seeds = itertools.count()


class Visitor(User):
    """A user of the server under test. locustfile.py sets the class variables."""

    abstract = True
    scenario: ClassVar[Scenario]
    recording: ClassVar[Recording]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.host = self.host.rstrip("/")
        self._session = traffic.open_session(self.host)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=arrivals.MAX_IN_FLIGHT))
        # The time sets apart the users of different worker processes.
        self._random = random.Random(f"{time.time()} {next(_seeds)}")

    def on_start(self) -> None:
        models = self._session.get(f"{self.host}/v1/models", timeout=traffic.TIMEOUT_S).json()
        self._knows_scenes = any(model["id"] == SHIPPED_MODEL for model in models["data"])

    def wait_time(self) -> float:
        return self._random.uniform(*self.scenario.think_s)

    def call(self, kind: str, due: float | None = None) -> None:
        """Runs one visit of this kind; `due` is its scheduled start in seconds since 1970."""
        caller = Caller(
            kind,
            self._session,
            self.host,
            self.recording.add,
            seed=self._random.getrandbits(64),
            knows_scenes=self._knows_scenes,
            think_s=self.scenario.think_s,
            due=due,
        )
        KINDS[kind](caller)


class Regular(Visitor):
    """Repeats one kind of traffic."""

    abstract = True
    kind: ClassVar[str]

    @task
    def visit(self) -> None:
        self.call(self.kind)


REGULARS: list[type[Regular]] = [
    type(kind.title().replace(" ", ""), (Regular,), {"kind": kind}) for kind in KINDS
]


class Generator(Visitor):
    """Runs an open loop; several generators share the rate."""

    def on_start(self) -> None:
        super().on_start()
        self._loop = OpenLoop(self.call, self._fail)

    @task
    def generate(self) -> None:
        plan = self.scenario
        if plan.trace is not None:
            coming = iter(scenario.read_trace(Path(plan.trace)))
        else:
            coming = arrivals.poisson(
                lambda second: plan.rate_at(second) / plan.generators,
                plan.seconds,
                plan.weights,
                self._random,
            )
        self._loop.run(coming)
        self.stop()

    def on_stop(self) -> None:
        self._loop.stop()
        self.recording.late_s = max(self.recording.late_s, self._loop.late_s)

    def _fail(self, kind: str, due: float, why: str) -> None:
        self.recording.add(Sample(due, kind, "latency", time.time() - due, failure=why))


class ScenarioShape(LoadTestShape):
    """Follows the scenario's load, and ends a run whose server has reached its breaking point."""

    abstract = True  # locust must not pick it up: locustfile.py makes the only instance

    def __init__(self, scenario: Scenario, recording: Recording) -> None:
        super().__init__()
        self._scenario = scenario
        self._recording = recording

    def tick(self) -> tuple[int, float] | None:
        second = self.get_run_time()
        load = self._scenario.load
        done = second >= self._scenario.seconds and self.get_current_user_count() == 0
        if done or second >= self._scenario.run_s:
            return None
        if load and load.breaks and (why := load.breaks.why(self._recording.recent(LOOK_BACK_S))):
            level = load.at(min(1.0, second / self._scenario.seconds))
            unit = "users" if self._scenario.arrivals == "closed" else "requests per second"
            logger.warning("breaking point at %.1f %s: %s", level, unit, why)
            return None
        return self._scenario.users_at(second), SPAWN_RATE
