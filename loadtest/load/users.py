"""locust's users: one class for each kind of traffic, and one that starts an open loop."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path
from typing import Any, ClassVar

import requests
from locust import User, task
from requests.adapters import HTTPAdapter

from load import arrivals, scenario, traffic
from load.arrivals import OpenLoop
from load.recording import Recording
from load.samples import Sample
from load.scenario import Scenario
from load.traffic import KINDS, Caller

SHIPPED_MODEL = "demo"  # as /v1/models calls the checkpoint that knows the scenes

_seeds = itertools.count()


class Visitor(User):
    """A user of the scenario's server; locustfile.py sets what they all share."""

    abstract = True
    scenario: ClassVar[Scenario]
    recording: ClassVar[Recording]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.host = self.host.rstrip("/")
        self._session = traffic.open_session(self.host)
        pool = HTTPAdapter(pool_maxsize=arrivals.MOST_UNDER_WAY)
        self._session.mount("http://", pool)
        self._session.mount("https://", pool)
        # Workers are processes of their own: the time tells their users apart.
        self._random = random.Random(f"{time.time()} {next(_seeds)}")

    def on_start(self) -> None:
        self._knows_scenes = serves_shipped(self._session, self.host)

    def wait_time(self) -> float:
        return self._random.uniform(*self.scenario.think_s)

    def call(self, kind: str, due: float | None = None) -> None:
        """Once; with `due`, as something that was to begin then, in seconds since 1970."""
        caller = Caller(
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
    """Whether the server has the checkpoint that knows the words for the scenes."""
    models = session.get(f"{host}/v1/models", timeout=traffic.TIMEOUT_S).json()
    return any(model["id"] == SHIPPED_MODEL for model in models["data"])


class Regular(Visitor):
    """Does the same kind of thing again and again."""

    abstract = True
    kind: ClassVar[str]

    @task
    def visit(self) -> None:
        self.call(self.kind)


class Captioner(Regular):
    kind = "caption"


class Uploader(Regular):
    kind = "upload"


class Questioner(Regular):
    kind = "question"


class Chatter(Regular):
    kind = "chat"


class StreamingChatter(Regular):
    kind = "streaming chat"


class LongReader(Regular):
    kind = "long stream"


class Photographer(Regular):
    kind = "photograph"


class Burst(Regular):
    kind = "same image"


class Stumbler(Regular):
    kind = "bad input"


class Leaver(Regular):
    kind = "hang-up"


CLOSED: list[type[Regular]] = Regular.__subclasses__()


class Generator(Visitor):
    """Starts requests of an open loop; of several generators each has its part of the rate."""

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
