"""Keeps every sample of a run, tells locust of each, and writes them when the run is over.

With workers, theirs travel to the master with locust's own reports. Beside them the server's own
figures are asked for all the time.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import gevent
import locust
import requests
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

from load import samples, server_series
from load.samples import Measure, Sample
from load.scenario import Scenario
from load.server_series import ServerSeries
from load.traffic import open_session

logger = logging.getLogger(__name__)

ASKED_EVERY_S = 2.0
RUN_FILE = "run.json"

# How locust's tables call them; latency has the kind alone. Tokens a second stand in its columns of
# milliseconds.
_NAMES: dict[Measure, str] = {
    "latency": "",
    "ttft": "TTFT ",
    "inter_token": "inter-token ",
    "tokens_per_s": "tokens/s ",
}


class Recording:
    """Of one locust process."""

    def __init__(
        self,
        environment: Environment,
        scenario: Scenario,
        output: Path | None,
        closed: Callable[[Path], int] = lambda _: 0,
    ) -> None:
        """`closed` is called with the folder once all is written; its result is the exit code."""
        self.samples: list[Sample] = []
        self.late_s = 0.0  # at most, of arrivals
        self._environment = environment
        self._scenario = scenario
        self._output = output
        self._closed = closed
        self._started = time.time()
        self._server = ServerSeries()
        self._asking: gevent.Greenlet | None = None
        events = environment.events
        events.test_start.add_listener(self._start)
        if isinstance(environment.runner, WorkerRunner):
            events.report_to_master.add_listener(self._report)
        else:
            events.worker_report.add_listener(self._receive)
            events.test_stop.add_listener(self._stop)

    def add(self, sample: Sample) -> None:
        self.samples.append(sample)
        seconds = sample.measure != "tokens_per_s"
        self._environment.events.request.fire(
            request_type=sample.measure,
            name=_NAMES[sample.measure] + sample.kind,
            response_time=sample.value * 1000 if seconds else sample.value,
            response_length=sample.tokens,
            exception=samples.Failure(sample.failure) if sample.failure else None,
            context={},
        )

    def recent(self, seconds: float) -> list[Sample]:
        """Latencies of requests that were answered in the last so many seconds."""
        since = time.time() - seconds
        return [s for s in self.samples if s.measure == "latency" and s.time + s.value >= since]

    def _start(self, **_: Any) -> None:
        self.samples, self.late_s, self._started = [], 0.0, time.time()
        if self._output is not None and not isinstance(self._environment.runner, WorkerRunner):
            self._server = ServerSeries()
            self._asking = gevent.spawn(self._ask_server)

    def _ask_server(self) -> None:
        """Again and again. Other servers have no such page: then nothing is known."""
        host = self._environment.host.rstrip("/")
        session = open_session(host)
        while True:
            try:
                page = session.get(f"{host}/metrics", timeout=30)
                page.raise_for_status()
                self._server.add(page.text, time.time())
            except (requests.RequestException, ValueError) as error:
                logger.info("no figures of the server: %s", error)
            gevent.sleep(ASKED_EVERY_S)

    def _report(self, data: dict[str, Any], **_: Any) -> None:
        data["samples"] = [astuple(sample) for sample in self.samples]
        data["late_s"] = self.late_s
        self.samples = []

    def _receive(self, data: dict[str, Any], **_: Any) -> None:
        self.samples.extend(Sample(*values) for values in data.pop("samples", ()))
        self.late_s = max(self.late_s, data.pop("late_s", 0.0))

    def _stop(self, **_: Any) -> None:
        if self._output is None:
            return
        if self._asking:
            self._asking.kill()
        self._output.mkdir(parents=True, exist_ok=True)
        runner = self._environment.runner
        run = {
            "scenario": self._scenario.model_dump(),
            "host": self._environment.host,
            "started": self._started,
            "ended": time.time(),
            "workers": len(runner.clients) if isinstance(runner, MasterRunner) else 0,
            "generator_late_s": self.late_s,
            "locust": locust.__version__,
        }
        (self._output / RUN_FILE).write_text(json.dumps(run, indent=1) + "\n")
        samples.write(self._output / samples.FILE, sorted(self.samples, key=lambda s: s.time))
        server_series.write(self._output / server_series.FILE, self._server.points)
        self._environment.process_exit_code = self._closed(self._output)
