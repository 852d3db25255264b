"""The locust scripts run against the real application."""

from __future__ import annotations

from pathlib import Path

from loadtest.load import report
from loadtest.load.traffic import KINDS
from support import load
from support.load import closed
from support.server import App


def test_every_kind_of_traffic_is_answered_correctly(demo: App, tmp_path: Path) -> None:
    run = load.run(tmp_path, demo.url, closed(len(KINDS), 10, *KINDS))

    assert run.failures == set()
    assert run.code == 0, run.output
    counts = {kind: len(run.latencies(kind)) for kind in KINDS}
    assert all(counts.values()), counts
    streams = {(s.kind, s.measure) for s in run.samples if s.measure != "latency"}
    assert {
        ("long stream", "ttft"),
        ("long stream", "inter_token"),
        ("long stream", "tokens_per_s"),
        ("streaming chat", "ttft"),
    } <= streams
    assert {s.tokens for s in run.latencies("long stream")} == {48}
    assert "TTFT long stream" in run.output
    assert (tmp_path / report.PAGE).exists()
