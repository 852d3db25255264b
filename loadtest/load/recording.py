"""Collects the samples of a run, reports them to locust, and writes them when the run ends.

Workers send theirs to the master with locust's own reports. Meanwhile the master reads the server's
/metrics.
"""

from __future__ import annotations

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

from loadtest.load import samples, server_series
from loadtest.load.samples import Measure, Sample
from loadtest.load.scenario import Scenario
from loadtest.load.server_series import ServerSeries
from loadtest.load.traffic import open_session
from loadtest.results import write_json

logger = logging.getLogger(__name__)

POLL_S = 2.0
RUN_FILE = "run.json"

# Prefixes of the entries in locust's tables, whose columns are in milliseconds even where the entry
# is in tokens per second.
_PREFIXES: dict[Measure, str] = {
    "latency": "",
    "ttft": "TTFT ",
    "inter_token": "inter-token ",
    "tokens_per_s": "tokens/s ",
}


class Failure(Exception):
    """Carries what is wrong with an answer into locust's list of failures."""


class Recording:
    """The samples of one locust process."""

    def __init__(
        self,
        environment: Environment,
        scenario: Scenario,
        output: Path | None,
        closed: Callable[[Path], int],
    ) -> None:
        """`closed(output)` is called once everything is written, and returns the exit code."""
        self.samples: list[Sample] = []
        self.late_s = 0.0  # the latest that an open loop has started a request
        self._environment = environment
        self._scenario = scenario
        self._output = output
        self._closed = closed
        self._started = time.time()
        self._server = ServerSeries()
        self._polling: gevent.Greenlet | None = None
        events = environment.events
        events.test_start.add_listener(self._start)
        if isinstance(environment.runner, WorkerRunner):
            events.report_to_master.add_listener(self._report)
        else:
            events.worker_report.add_listener(self._receive)
            events.test_stop.add_listener(self._stop)

    def add(self, sample: Sample) -> None:
        self.samples.append(sample)
        in_seconds = sample.measure != "tokens_per_s"
        self._environment.events.request.fire(
            request_type=sample.measure,
            name=_PREFIXES[sample.measure] + sample.kind,
            response_time=sample.value * 1000 if in_seconds else sample.value,
            response_length=sample.tokens,
            exception=Failure(sample.failure) if sample.failure else None,
            context={},
        )

    def recent(self, seconds: float) -> list[Sample]:
        """The latencies of requests answered in the last `seconds`."""
        since = time.time() - seconds
        return [s for s in samples.latencies(self.samples) if s.time + s.value >= since]

    def _start(self, **_: Any) -> None:
        self.samples, self.late_s, self._started = [], 0.0, time.time()
        if self._output is not None and not isinstance(self._environment.runner, WorkerRunner):
            self._server = ServerSeries()
            self._polling = gevent.spawn(self._poll_server)

    def _poll_server(self) -> None:
        """Reads /metrics until it is killed. Servers without that page only leave a log line."""
        host = self._environment.host.rstrip("/")
        session = open_session(host)
        while True:
            try:
                page = session.get(f"{host}/metrics", timeout=30)
                page.raise_for_status()
                self._server.add(page.text, time.time())
            except (requests.RequestException, ValueError) as error:
                logger.info("no figures from the server: %s", error)
            gevent.sleep(POLL_S)

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
        if self._polling:
            self._polling.kill()
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
        write_json(self._output / RUN_FILE, run)
        samples.write(self._output / samples.FILE, sorted(self.samples, key=lambda s: s.time))
        server_series.write(self._output / server_series.FILE, self._server.points)
        self._environment.process_exit_code = self._closed(self._output)
