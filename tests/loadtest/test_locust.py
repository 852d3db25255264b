"""locust as an operator runs it, against a server without surprises."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import load
from support.load import closed
from support.server import free_port

# Answers after 20 ms; two seconds after the first request, stalls for two seconds.
STALLING = ("--delay", "0.02", "--stall-at", "2", "--stall-for", "2")


@contextlib.contextmanager
def null_server(*options: str) -> Iterator[str]:
    """The URL of a server that computes nothing."""
    command = [sys.executable, str(Path(__file__).with_name("null_server.py")), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


def poisson(rate: float, seconds: float, drain_s: float = 10) -> dict[str, Any]:
    return {**closed(rate, seconds, "caption"), "arrivals": "poisson", "drain_s": drain_s}


def slow(run: load.Run) -> list[float]:
    return [sample.value for sample in run.latencies() if sample.value > 1]


def test_wrong_answers_are_failures_and_fail_the_run(tmp_path: Path) -> None:
    with null_server() as url:
        # The server answers every stream with two tokens and refuses nothing.
        run = load.run(tmp_path, url, closed(3, 3, "long stream", "bad input", "caption"))

    assert run.code == 1
    assert not any(sample.failure for sample in run.latencies("caption"))
    assert all(sample.failure for sample in run.latencies("bad input"))
    assert {s.failure for s in run.latencies("long stream")} == {"2 tokens instead of 48"}
    assert "SLOs missed: error ratio" in run.output


def test_insistent_users_are_answered_though_they_are_refused_at_first(tmp_path: Path) -> None:
    for refusals, failures in (
        (2, set()),
        (10, {"insistent caption: refused 10 times"}),
    ):
        folder = tmp_path / str(refusals)
        folder.mkdir()
        with null_server("--refusals", str(refusals)) as url:
            run = load.run(folder, url, closed(2, 2, "insistent caption"))
        assert run.latencies("insistent caption")
        assert run.failures == failures


@pytest.mark.long
def test_an_open_loop_shows_a_stall_that_a_closed_one_hides(tmp_path: Path) -> None:
    """Coordinated omission: while the server stalls, four waiting users send nothing."""
    runs = {}
    for name, scenario in (("closed", closed(4, 6, "caption")), ("open", poisson(50, 6))):
        folder = tmp_path / name
        folder.mkdir()
        with null_server(*STALLING) as url:
            runs[name] = load.run(folder, url, scenario)

    assert 1 <= len(slow(runs["closed"])) <= 4
    assert len(slow(runs["open"])) > 20  # of some 50 in the first second of the stall
    assert len(slow(runs["open"])) > 0.05 * len(runs["open"].latencies())  # the p95 shows it
    assert len(slow(runs["closed"])) < 0.05 * len(runs["closed"].latencies())  # the p95 does not


def test_requests_of_an_open_loop_without_an_answer_at_the_end_are_failures(tmp_path: Path) -> None:
    with null_server("--stall-at", "1", "--stall-for", "60") as url:
        run = load.run(tmp_path, url, poisson(10, 3, drain_s=1))

    assert run.code == 1
    lost = [s for s in run.latencies() if s.failure == "not answered when the run ended"]
    assert 5 <= len(lost) < len(run.latencies())
    assert all(sample.value >= 1 for sample in lost)


def test_a_ramp_ends_at_the_breaking_point_and_reports_it(tmp_path: Path) -> None:
    breaks = {"latency_p95_s": 0.3}
    scenario = poisson(20, 60)
    scenario["load"] = {"shape": "ramp", "level": 20, "peak": 40, "breaks": breaks}
    with null_server("--delay", "0.5") as url:
        run = load.run(tmp_path, url, scenario)

    assert "breaking point at 2" in run.output
    assert "requests per second: the last requests' p95 was 0.5 s" in run.output
    ended = json.loads((tmp_path / "run.json").read_text())
    assert ended["ended"] - ended["started"] < 30


@pytest.mark.long
def test_samples_of_workers_reach_the_master(tmp_path: Path) -> None:
    scenario = closed(4, 4, "streaming chat", "caption")
    port = str(free_port())
    with null_server() as url:
        asked = load.command(tmp_path, url, scenario, {"error_ratio": 0})
        bind = ["--master", "--expect-workers", "1", "--master-bind-port", port]
        master = load.start([*asked, *bind])
        worker = load.start([*asked, "--worker", "--master-port", port])
        try:
            run = load.finished(tmp_path, master)
        finally:
            worker.kill()
            worker.communicate()

    assert run.code == 0, run.output
    assert json.loads((tmp_path / "run.json").read_text())["workers"] == 1
    assert len(run.latencies("caption")) > 5
    measures = {s.measure for s in run.samples if s.kind == "streaming chat"}
    assert measures >= {"latency", "ttft"}
    assert "TTFT streaming chat" in run.output


def test_a_trace_is_replayed_with_its_kinds_and_times(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("seconds,kind\n0.2,caption\n1.5,question\n1.5,caption\n")
    with null_server() as url:
        scenario = {"arrivals": "replay", "trace": "trace.csv", "seconds": 2, "drain_s": 5}
        # With a trailing slash, as people copy URLs.
        run = load.run(tmp_path, f"{url}/", scenario)

    assert [sample.kind for sample in run.latencies()].count("caption") == 2
    first, *others = sorted(sample.time for sample in run.latencies())
    assert all(abs(at - first - 1.3) < 1e-3 for at in others)  # scheduled, not actual, starts
