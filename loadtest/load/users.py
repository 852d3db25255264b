"""locust's users: a class for each kind of traffic, and one that runs an open loop."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path
from typing import Any, ClassVar

import requests
from locust import User, task
from requests.adapters import HTTPAdapter

from loadtest.load import arrivals, scenario, traffic
from loadtest.load.arrivals import OpenLoop
from loadtest.load.recording import Recording
from loadtest.load.samples import Sample
from loadtest.load.scenario import Scenario
from loadtest.load.traffic import KINDS, Caller

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
        self._knows_scenes = serves_shipped(self._session, self.host)

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


def serves_shipped(session: requests.Session, host: str) -> bool:
    """Whether the server has the checkpoint that knows the scenes' captions."""
    models = session.get(f"{host}/v1/models", timeout=traffic.TIMEOUT_S).json()
    return any(model["id"] == SHIPPED_MODEL for model in models["data"])


class Regular(Visitor):
    """Repeats one kind of traffic."""

    abstract = True
    kind: ClassVar[str]

    @task
    def visit(self) -> None:
        self.call(self.kind)


def _regular(kind: str) -> type[Regular]:
    return type(kind.title().replace(" ", ""), (Regular,), {"kind": kind})


REGULARS: list[type[Regular]] = [_regular(kind) for kind in KINDS]


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
