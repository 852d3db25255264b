"""The report of a load test: figures, files, and the page in a browser."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from loadtest.load import report, samples, server_series
from loadtest.load.samples import Sample
from loadtest.load.server_series import Point
from support.browser import render

START = 1_800_000_000.0
SCENARIO = {"about": "a test of <everything>", "arrivals": "closed"}


def write_run(folder: Path, *, latency: float = 0.5, failure: str = "", late: float = 0.0) -> None:
    """A minute with a caption and a stream per second; one caption may have failed."""
    run = {
        "scenario": SCENARIO,
        "host": "http://127.0.0.1:1",
        "started": START,
        "ended": START + 60,
        "workers": 0,
        "generator_late_s": late,
        "locust": "2",
    }
    (folder / "run.json").write_text(json.dumps(run))
    found = []
    for second in range(60):
        at = START + second
        wrong = failure if second == 30 else ""
        found.append(Sample(at, "caption", "latency", latency, 10, wrong))
        found.append(Sample(at + 0.1, "streaming chat", "latency", 0.9, 5))
        found.append(Sample(at + 0.1, "streaming chat", "ttft", 0.2))
        found.append(Sample(at + 0.1, "streaming chat", "inter_token", 0.02))
    samples.write(folder / samples.FILE, found)
    points = [
        Point(START + second, name, stage, float(second % 7))
        for second in range(0, 60, 2)
        for name in ("queue seconds", "busy", "occupancy", "waiting", "KV slots used", "replicas")
        for stage in server_series.STAGES
    ]
    server_series.write(folder / server_series.FILE, points)


def slo_file(folder: Path, p95: float) -> Path:
    path = folder / "slo.yaml"
    path.write_text(f"latency: {{caption: {{p95: {p95}}}}}\nerror_ratio: 0.05\n")
    return path


def test_page_output_and_exit_code_say_that_all_slos_were_met(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path)

    assert report.close(tmp_path, slo_file(tmp_path, p95=1.0)) == 0

    assert "all SLOs met" in capsys.readouterr().out
    assert "<h1 class=met>All SLOs met</h1>" in (tmp_path / report.PAGE).read_text()


def test_a_missed_slo_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)

    assert report.close(tmp_path, slo_file(tmp_path, p95=0.4)) == 1

    printed = capsys.readouterr().out
    assert "SLOs missed: caption latency p95" in printed
    assert "MISSED  caption latency p95: 0.5 (limit 0.4)" in printed
    assert "1 of 2 SLOs missed" in (tmp_path / report.PAGE).read_text()


def test_figures_and_table_hold_what_was_measured(tmp_path: Path) -> None:
    write_run(tmp_path, failure="status 500: <script>")

    report.close(tmp_path, slo_file(tmp_path, p95=1.0))

    figures = json.loads((tmp_path / report.FIGURES).read_text())
    whole = figures["summary"]
    assert whole["failures"] == {"caption: status 500: <script>": 1}
    assert whole["seconds"] == pytest.approx(60.0)
    assert whole["requests_per_s"] == pytest.approx(119 / 60)
    assert whole["tokens_per_s"] == pytest.approx((59 * 10 + 60 * 5) / 60)
    assert figures["machine"]["cores"] > 0
    assert {"python", "revision", "date", "ray"} <= figures["machine"].keys()
    with (tmp_path / report.TABLE).open() as file:
        rows = {(row["kind"], row["measure"]): row for row in csv.DictReader(file)}
    assert rows["caption", "latency"]["failures"] == "1"
    assert float(rows["streaming chat", "ttft"]["p95"]) == pytest.approx(0.2)


def test_text_from_servers_and_scenarios_is_escaped(tmp_path: Path) -> None:
    write_run(tmp_path, failure="<script>alert(1)</script>")

    report.close(tmp_path, slo_file(tmp_path, p95=1.0))

    page = (tmp_path / report.PAGE).read_text()
    assert "<script>" not in page
    assert "a test of &lt;everything&gt;" in page


def test_a_late_generator_and_a_server_without_metrics_are_noted(tmp_path: Path) -> None:
    write_run(tmp_path, late=0.4)
    (tmp_path / server_series.FILE).unlink()

    report.close(tmp_path, slo_file(tmp_path, p95=1.0))

    page = (tmp_path / report.PAGE).read_text()
    assert "started a request 0.40 s late" in page
    assert "its own figures are missing" in page


def test_a_browser_shows_both_plots_without_other_requests(tmp_path: Path) -> None:
    write_run(tmp_path)
    report.close(tmp_path, slo_file(tmp_path, p95=1.0))
    page = tmp_path / report.PAGE
    assert not re.findall(r'(?:src|href)="(?!data:)', page.read_text())
    probe = (
        "<script>addEventListener('load', () => document.body.dataset.shown = "
        "[...document.images].map(i => i.naturalWidth > 500 && i.width <= innerWidth))</script>"
    )
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</html>", probe + "</html>"))

    document = render(probed.as_uri(), tmp_path, width=400)

    assert 'data-shown="true,true"' in document
    assert "All SLOs met" in document
