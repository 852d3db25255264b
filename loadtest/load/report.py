"""The report of a load test: an HTML page with verdicts, tables and plots, and the same as files.

It reads only the folder that a run left behind.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtest import plotting
from loadtest.load import samples, server_series
from loadtest.load.samples import Measure, Sample, latencies
from loadtest.load.server_series import Point
from loadtest.load.slo import Slos, Verdict, judge
from loadtest.results import machine, read_json, write_csv, write_json
from loadtest.stats import percentiles

SLO_FILE = Path(__file__).parents[1] / "slo.yaml"
PAGE, FIGURES, TABLE = "report.html", "report.json", "report.csv"
WINDOWS = 40  # of a run, in plots over time
LATE_S = 0.1  # a generator that starts requests later than this distorts the figures


@dataclass(frozen=True)
class Row:
    """The statistics of one measure of one kind, in seconds or tokens per second."""

    kind: str
    measure: Measure
    count: int
    failures: int
    mean: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class Summary:
    """A whole run. Rates count right answers only."""

    seconds: float
    requests_per_s: float
    tokens_per_s: float
    failures: dict[str, int]  # by kind and reason
    rows: list[Row]


def summary(run: dict[str, Any], found: Sequence[Sample]) -> Summary:
    """Summarises the samples; `run` is the content of run.json."""
    requests = latencies(found)
    right = [s for s in requests if not s.failure]
    last = max([s.time + s.value for s in requests], default=run["ended"])
    seconds = max(last - run["started"], 1e-9)
    by_row: dict[tuple[str, Measure], list[Sample]] = {}
    for sample in found:
        by_row.setdefault((sample.kind, sample.measure), []).append(sample)
    return Summary(
        seconds=seconds,
        requests_per_s=len(right) / seconds,
        tokens_per_s=sum(s.tokens for s in right) / seconds,
        failures=dict(Counter(f"{s.kind}: {s.failure}" for s in requests if s.failure)),
        rows=[_row(*key, some) for key, some in sorted(by_row.items())],
    )


def close(output: Path, slo_file: Path) -> int:
    """Writes the report into a run's folder, prints the verdicts, and returns the exit code."""
    found = samples.read(output / samples.FILE)
    verdicts = judge(found, Slos.read(slo_file))
    write(output, found, verdicts)
    print(f"\n{output / PAGE}")
    for verdict in verdicts:
        print(verdict)
    missed = [verdict.name for verdict in verdicts if not verdict.met]
    print(f"SLOs missed: {', '.join(missed)}" if missed else "all SLOs met")
    return int(bool(missed))


def write(output: Path, found: Sequence[Sample], verdicts: Sequence[Verdict]) -> None:
    """Writes PAGE, FIGURES and TABLE into the folder of the run."""
    run = read_json(output / "run.json")
    points = server_series.read(output / server_series.FILE)
    whole = summary(run, found)
    settings = {"run": run, "machine": machine()}
    judged = [asdict(verdict) for verdict in verdicts]
    write_json(output / FIGURES, {**settings, "verdicts": judged, "summary": asdict(whole)})
    write_csv(output / TABLE, Row, whole.rows)
    plots = {"Over time, seen by the client": _client_plot(run, found)}
    if points:
        plots["Over time, from the server's /metrics"] = _server_plot(run, points)
    (output / PAGE).write_text(_page(settings, whole, verdicts, plots))


def _row(kind: str, measure: Measure, some: Sequence[Sample]) -> Row:
    values = [s.value for s in some]
    failures = sum(bool(s.failure) for s in some)
    p50, p95, p99 = percentiles(values, 50, 95, 99)
    return Row(kind, measure, len(some), failures, float(np.mean(values)), p50, p95, p99)


# -- plots -----------------------------------------------------------------------------------------


def _client_plot(run: dict[str, Any], found: Sequence[Sample]) -> Figure:
    requests, started = latencies(found), run["started"]
    figure, axes = plotting.panels(3, height=8)
    rate, latency, streams = axes
    edges = np.linspace(0, max(run["ended"] - started, 1e-9), WINDOWS + 1)
    times = {
        "started": [s.time - started for s in requests],
        "right": [s.time + s.value - started for s in requests if not s.failure],
        "failed": [s.time + s.value - started for s in requests if s.failure],
    }
    for name, moments in times.items():
        counts, _ = np.histogram(moments, edges)
        rate.plot(edges[:-1] + edges[1] / 2, counts / edges[1], label=name)
    rate.set_ylabel("requests per second")
    for percent in (50, 95, 99):
        _percentile(latency, requests, started, edges, percent, f"p{percent}")
    latency.set_ylabel("latency, s")
    for measure, name in (("ttft", "time to first token"), ("inter_token", "inter-token")):
        some = [s for s in found if s.measure == measure]
        _percentile(streams, some, started, edges, 95, f"{name} p95")
    streams.set_ylabel("streams, s")
    streams.set_xlabel("seconds since the start")
    plotting.finish(axes)
    return figure


def _percentile(
    axes: Axes, found: Sequence[Sample], started: float, edges: Any, percent: int, label: str
) -> None:
    """Plots a percentile over time, by scheduled start."""
    windows = np.digitize([s.time - started for s in found], edges)
    values = np.array([s.value for s in found])
    present = [w for w in range(1, len(edges)) if (windows == w).any()]
    ys = [percentiles(values[windows == w], percent)[0] for w in present]
    axes.plot([edges[w - 1] + edges[1] / 2 for w in present], ys, label=label)


def _server_plot(run: dict[str, Any], points: Sequence[Point]) -> Figure:
    labels = {
        "queue seconds": "queue seconds",
        "busy": "seconds of work\nper second",
        "occupancy": "occupied share\nof a batch",
        "waiting": "waiting",
        "KV slots used": "KV slots used",
        "replicas": "replicas",
    }
    figure, axes = plotting.panels(len(labels), height=13)
    for panel, (name, label) in zip(axes, labels.items(), strict=True):
        for stage in server_series.STAGES:
            some = [p for p in points if p.name == name and p.stage == stage]
            if some:
                times = [p.time - run["started"] for p in some]
                panel.plot(times, [p.value for p in some], label=stage)
        panel.set_ylabel(label)
    axes[-1].set_xlabel("seconds since the start")
    plotting.finish(axes)
    return figure


# -- the page --------------------------------------------------------------------------------------

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem;
  color: #1b1f24; background: #fff; color-scheme: light; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
div.wide { overflow-x: auto; }
td, th { padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid #d8dee4; }
td:first-child, th:first-child { text-align: left; }
.met { color: #1a7f37; } .missed { color: #b42318; font-weight: 600; }
p.note { background: #fff8c5; padding: .5rem .8rem; } img { max-width: 100%; }
pre { white-space: pre-wrap; font-size: .85rem; background: #f6f8fa; padding: .8rem; }
"""


def _page(
    settings: dict[str, Any],
    whole: Summary,
    verdicts: Sequence[Verdict],
    plots: dict[str, Figure],
) -> str:
    missed = sum(not verdict.met for verdict in verdicts)
    title = f"{missed} of {len(verdicts)} SLOs missed" if missed else "All SLOs met"
    body = "\n".join(_body(settings, whole, verdicts, plots))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1 class={'missed' if missed else 'met'}>{title}</h1>\n{body}</html>\n"
    )


def _body(
    settings: dict[str, Any],
    whole: Summary,
    verdicts: Sequence[Verdict],
    plots: dict[str, Figure],
) -> Iterator[str]:
    run = settings["run"]
    yield (
        f"<p>{html.escape(run['scenario']['about'])}: {run['host']}, {whole.seconds:.0f} s, "
        f"{whole.requests_per_s:.2f} right answers and {whole.tokens_per_s:.1f} tokens per second, "
        f"{sum(whole.failures.values())} failures</p>"
    )
    for note in _notes(run, plots):
        yield f'<p class="note">{note}</p>'
    yield "<h2>SLOs</h2>" + _table(
        ("objective", "measured", "limit", ""),
        [
            (v.name, f"{v.measured:.3g}", f"{v.limit:g}", "met" if v.met else "MISSED")
            for v in verdicts
        ],
    )
    yield (
        "<h2>By kind</h2><p>In seconds, except tokens_per_s; latency counts from the scheduled "
        "start.</p>"
    )
    yield _table(
        ("kind", "measure", "count", "failures", "mean", "p50", "p95", "p99"),
        [
            (
                *(r.kind, r.measure, f"{r.count}", f"{r.failures}"),
                *(f"{number:.3g}" for number in (r.mean, r.p50, r.p95, r.p99)),
            )
            for r in whole.rows
        ],
    )
    if whole.failures:
        worst = Counter(whole.failures).most_common(20)
        yield "<h2>Failures</h2>" + _table(("reason", "count"), [(w, f"{n}") for w, n in worst])
    for name, figure in plots.items():
        yield f'<h2>{name}</h2><img alt="{name}" src="{plotting.data_url(figure)}">'
    yield f"<h2>Configuration</h2><pre>{html.escape(json.dumps(settings, indent=1))}</pre>"


def _notes(run: dict[str, Any], plots: dict[str, Figure]) -> Iterator[str]:
    if run.get("generator_late_s", 0.0) > LATE_S:
        yield (
            f"The load generator started a request {run['generator_late_s']:.2f} s late: one "
            "process cannot send this much, and the figures include its delays. Use more workers."
        )
    if len(plots) == 1:
        yield "The server has no /metrics page of blip2-serve, so its own figures are missing."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        classes = {"met": " class=met", "MISSED": " class=missed"}
        tds = (f"<{tag}{classes.get(c, '')}>{html.escape(c)}</{tag}>" for c in cells)
        return f"<tr>{''.join(tds)}</tr>"

    lines = [line(head, "th"), *(line(row, "td") for row in rows)]
    return f"<div class=wide><table>{''.join(lines)}</table></div>"
