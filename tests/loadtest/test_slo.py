"""Runs are judged by their SLOs."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.load import scenario
from loadtest.load.report import SLO_FILE
from loadtest.load.samples import Sample
from loadtest.load.slo import Slos, goodput, judge
from loadtest.load.traffic import KINDS, open_session

CHAOS = SLO_FILE.with_name("slo-chaos.yaml")


def run(latency: float, *, failures: int = 0, ttft: float = 0.1) -> list[Sample]:
    """A hundred captions and as many streams."""
    captions = [
        Sample(t, "caption", "latency", latency, 5, "wrong" if t < failures else "")
        for t in range(100)
    ]
    streams = [
        sample
        for t in range(100)
        for sample in (
            Sample(t + 0.5, "streaming chat", "latency", 1.0, 5),
            Sample(t + 0.5, "streaming chat", "ttft", ttft),
        )
    ]
    return captions + streams


SLOS = Slos.model_validate(
    {
        "latency": {"caption": {"p50": 1.0, "p95": 2.0}},
        "ttft": {"streaming chat": {"p95": 0.5}},
        "error_ratio": 0.01,
        "goodput": 0.95,
    }
)


def missed(samples: list[Sample]) -> list[str]:
    return [verdict.name for verdict in judge(samples, SLOS) if not verdict.met]


def test_a_good_run_meets_every_slo() -> None:
    verdicts = judge(run(0.5), SLOS)

    assert all(verdict.met for verdict in verdicts)
    assert [verdict.name for verdict in verdicts] == [
        "caption latency p50",
        "caption latency p95",
        "streaming chat ttft p95",
        "error ratio",
        "goodput",
    ]


def test_each_slo_is_missed_for_its_own_reason() -> None:
    assert missed(run(1.5)) == ["caption latency p50"]
    assert missed(run(2.5)) == ["caption latency p50", "caption latency p95", "goodput"]
    assert missed(run(0.5, ttft=0.6)) == ["streaming chat ttft p95", "goodput"]
    assert missed(run(0.5, failures=4)) == ["error ratio"]
    assert missed(run(0.5, failures=40)) == ["error ratio", "goodput"]


def test_goodput_counts_a_request_once_and_only_if_all_its_measures_are_good() -> None:
    assert goodput(run(0.5), SLOS) == 1.0
    assert goodput(run(0.5, failures=10), SLOS) == 0.95
    assert goodput(run(0.5, ttft=0.6), SLOS) == 0.5
    assert goodput(run(2.5, failures=10, ttft=0.6), SLOS) == 0.0


def test_a_run_without_requests_meets_nothing() -> None:
    (verdict,) = judge([], SLOS)
    assert not verdict.met


def test_a_missing_kind_is_not_judged() -> None:
    verdicts = judge([s for s in run(0.5) if s.kind == "caption"], SLOS)
    assert not any("streaming" in verdict.name for verdict in verdicts)


@pytest.mark.parametrize("file", [SLO_FILE, CHAOS], ids=lambda file: file.name)
def test_the_shipped_slos_name_known_kinds(file: Path) -> None:
    slos = Slos.read(file)

    assert {*slos.latency, *slos.ttft, *slos.inter_token} <= KINDS.keys()
    assert slos.error_ratio is not None
    assert slos.goodput is not None or file == CHAOS


def test_under_faults_one_lost_request_is_too_many() -> None:
    assert all(verdict.met for verdict in judge(run(6.0, ttft=6.0), Slos.read(CHAOS)))
    lost = [v.name for v in judge(run(6.0, failures=1), Slos.read(CHAOS)) if not v.met]
    assert lost == ["error ratio"]
    assert {*Slos.read(CHAOS).latency, *Slos.read(CHAOS).ttft} == scenario.load("chaos").kinds


def test_load_is_sent_with_the_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIP2_API_KEY", "blip2-secret")

    assert open_session("http://127.0.0.1").headers["authorization"] == "Bearer blip2-secret"
