"""One page about a run: verdicts, tables, plots; also as JSON and CSV.

It reads what a run left in its folder, and knows nothing of locust.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.machine import machine
from load import samples, server_series
from load.samples import Measure, Sample
from load.server_series import Point
from load.slo import Slos, Verdict, judge

SLO_FILE = Path(__file__).parents[1] / "slo.yaml"
PAGE, FIGURES, TABLE = "report.html", "report.json", "report.csv"
WINDOWS = 40  # of a run, in plots over time
LATE_S = 0.1  # a generator that starts requests later than that measures itself


@dataclass(frozen=True)
class Row:
    """What there is to say about one measure of one kind. Seconds, or tokens a second."""

    kind: str
    measure: Measure
    count: int
    failures: int
    mean: float
    p50: float
    p95: float
    p99: float

    @property
    def spread(self) -> tuple[float, float, float, float]:
        return self.mean, self.p50, self.p95, self.p99


@dataclass(frozen=True)
class Summary:
    """A whole run."""

    seconds: float
    requests_per_s: float
    tokens_per_s: float
    failures: dict[str, int]  # by what was wrong
    rows: list[Row]


def summary(run: dict[str, Any], found: Sequence[Sample]) -> Summary:
    """`run` is what run.json says."""
    requests = [s for s in found if s.measure == "latency"]
    right = [s for s in requests if not s.failure]
    last = max([s.time + s.value for s in requests], default=run["ended"])
    seconds = max(last - run["started"], 1e-9)
    failures: dict[str, int] = {}
    for sample in requests:
        if sample.failure:
            name = f"{sample.kind}: {sample.failure}"
            failures[name] = failures.get(name, 0) + 1
    keys = sorted({(s.kind, s.measure) for s in found})
    return Summary(
        seconds=seconds,
        requests_per_s=len(right) / seconds,
        tokens_per_s=sum(s.tokens for s in right) / seconds,
        failures=failures,
        rows=[_row(kind, measure, found) for kind, measure in keys],
    )


def close(output: Path, slo_file: Path) -> int:
    """Writes the report into a run's folder, prints the verdicts, and returns the exit code."""
    found = samples.read(output / samples.FILE)
    verdicts = judge(found, Slos.read(slo_file))
    write(output, found, verdicts)
    print(f"\n{output / PAGE}")
    for verdict in verdicts:
        print(verdict)
    missed = [verdict.name for verdict in verdicts if not verdict.kept]
    print(f"SLOs missed: {', '.join(missed)}" if missed else "all SLOs kept")
    return int(bool(missed))


def write(output: Path, found: Sequence[Sample], verdicts: Sequence[Verdict]) -> None:
    """PAGE, FIGURES and TABLE, into the folder in which the run has left the rest."""
    run = json.loads((output / "run.json").read_text())
    points = server_series.read(output / server_series.FILE)
    about = machine()
    whole = summary(run, found)
    figures = {
        "run": run,
        "machine": about,
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "summary": asdict(whole),
    }
    (output / FIGURES).write_text(json.dumps(figures, indent=1) + "\n")
    with (output / TABLE).open("w", newline="") as file:
        table = csv.DictWriter(file, list(Row.__dataclass_fields__))
        table.writeheader()
        table.writerows(asdict(row) for row in whole.rows)
    plots = [_client_plot(run, found), *([_server_plot(run, points)] if points else [])]
    (output / PAGE).write_text(_page(run, about, whole, verdicts, plots))


# -- plots -----------------------------------------------------------------------------------------


def _client_plot(run: dict[str, Any], found: Sequence[Sample]) -> Figure:
    requests = [s for s in found if s.measure == "latency"]
    figure, (rate, latency, streams) = plt.subplots(3, 1, figsize=(9, 8), sharex=True)
    edges = np.linspace(0, max(run["ended"] - run["started"], 1e-9), WINDOWS + 1)
    width = edges[1]
    answered = {"right": [], "failed": []}  # type: dict[str, list[float]]
    for sample in requests:
        name = "failed" if sample.failure else "right"
        answered[name].append(sample.time + sample.value - run["started"])
    due = [sample.time - run["started"] for sample in requests]
    for name, times in {"started": due, **answered}.items():
        counts, _ = np.histogram(times, edges)
        rate.plot(edges[:-1] + width / 2, counts / width, label=name)
    rate.set_ylabel("requests a second")
    _percentiles(latency, requests, run["started"], edges)
    latency.set_ylabel("latency, s")
    for measure, name in (("ttft", "time to first token"), ("inter_token", "between tokens")):
        some = [s for s in found if s.measure == measure]
        _percentiles(streams, some, run["started"], edges, (95,), name + " ")
    streams.set_ylabel("streams, s")
    streams.set_xlabel("seconds since the start")
    return _finished(figure, (rate, latency, streams))


def _percentiles(
    axes: Axes,
    found: Sequence[Sample],
    started: float,
    edges: Any,
    percents: tuple[int, ...] = (50, 95, 99),
    name: str = "",
) -> None:
    """Over time, by when requests were to start."""
    times = np.array([s.time - started for s in found])
    values = np.array([s.value for s in found])
    windows = np.digitize(times, edges)
    present = [w for w in range(1, len(edges)) if (windows == w).any()]
    for percent in percents:
        ys = [np.percentile(values[windows == w], percent) for w in present]
        axes.plot([edges[w - 1] + edges[1] / 2 for w in present], ys, label=f"{name}p{percent}")


def _server_plot(run: dict[str, Any], points: Sequence[Point]) -> Figure:
    panels = (
        ("queue seconds", "queue seconds"),
        ("busy", "seconds of work\na second"),
        ("occupancy", "share of a batch's\nplaces that are taken"),
        ("waiting", "waiting"),
        ("KV rows used", "KV rows used"),
        ("replicas", "replicas"),
    )
    figure, axes = plt.subplots(len(panels), 1, figsize=(9, 13), sharex=True)
    for panel, (name, label) in zip(axes, panels, strict=True):
        for stage in server_series.STAGES:
            some = [p for p in points if p.name == name and p.stage == stage]
            if some:
                times = [p.time - run["started"] for p in some]
                panel.plot(times, [p.value for p in some], label=stage)
        panel.set_ylabel(label)
    axes[-1].set_xlabel("seconds since the start")
    return _finished(figure, axes)


def _finished(figure: Figure, panels: Sequence[Axes]) -> Figure:
    for axes in panels:
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper right", fontsize="small")
    figure.tight_layout()
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
.kept { color: #1a7f37; } .missed { color: #b42318; font-weight: 600; }
p.note { background: #fff8c5; padding: .5rem .8rem; } img { max-width: 100%; }
pre { white-space: pre-wrap; font-size: .85rem; background: #f6f8fa; padding: .8rem; }
"""


def _page(
    run: dict[str, Any],
    about: dict[str, Any],
    whole: Summary,
    verdicts: Sequence[Verdict],
    plots: Sequence[Figure],
) -> str:
    missed = sum(not verdict.kept for verdict in verdicts)
    title = f"{missed} of {len(verdicts)} SLOs missed" if missed else "All SLOs kept"
    state = "missed" if missed else "kept"
    parts = [
        f"<h1 class={state}>{title}</h1>",
        f"<p>{html.escape(run['scenario']['about'])}: {run['host']}, {whole.seconds:.0f} s, "
        f"{whole.requests_per_s:.2f} right answers a second, {whole.tokens_per_s:.1f} tokens a "
        f"second, {sum(whole.failures.values())} failures</p>",
        *_notes(run, plots),
        "<h2>SLOs</h2>",
        _table(
            ("objective", "measured", "limit", ""),
            [(v.name, _short(v.measured), f"{v.limit:g}", _verdict(v)) for v in verdicts],
        ),
        "<h2>By kind</h2><p>Seconds, tokens_per_s in tokens a second; latency from the moment at "
        "which a request was to start.</p>",
        _table(
            ("kind", "measure", "count", "failures", "mean", "p50", "p95", "p99"),
            [
                (r.kind, r.measure, f"{r.count}", f"{r.failures}", *map(_short, r.spread))
                for r in whole.rows
            ],
        ),
    ]
    if whole.failures:
        worst = sorted(whole.failures.items(), key=lambda item: -item[1])[:20]
        parts += ["<h2>Failures</h2>", _table(("what", "times"), [(w, f"{n}") for w, n in worst])]
    names = ("Over time, at the client", "Over time, in the server (by its own /metrics)")
    for name, figure in zip(names, plots, strict=False):
        parts.append(f'<h2>{name}</h2><img alt="{name}" src="{_inline(figure)}">')
    settings = html.escape(json.dumps({"run": run, "machine": about}, indent=1))
    parts.append(f"<h2>Configuration</h2><pre>{settings}</pre>")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{title}</title><style>{_STYLE}</style>'
        + "\n".join(parts)
        + "</html>\n"
    )


def _notes(run: dict[str, Any], plots: Sequence[Figure]) -> list[str]:
    notes = []
    if run.get("generator_late_s", 0.0) > LATE_S:
        notes.append(
            f"The load generator started a request {run['generator_late_s']:.2f} s late: it had "
            "more to do than one process can. Take more workers; these figures measure it, too."
        )
    if len(plots) == 1:
        notes.append(
            "The server has no /metrics page of blip2-serve, so its own figures are missing."
        )
    return [f'<p class="note">{note}</p>' for note in notes]


def _short(number: float) -> str:
    return f"{number:.3g}"


def _verdict(verdict: Verdict) -> str:
    return "kept" if verdict.kept else "MISSED"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        marks = {"kept": " class=kept", "MISSED": " class=missed"}
        tds = (f"<{tag}{marks.get(c, '')}>{html.escape(c)}</{tag}>" for c in cells)
        return f"<tr>{''.join(tds)}</tr>"

    lines = [line(head, "th"), *(line(row, "td") for row in rows)]
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def _inline(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _row(kind: str, measure: Measure, found: Sequence[Sample]) -> Row:
    some = [s for s in found if (s.kind, s.measure) == (kind, measure)]
    values = [s.value for s in some]
    p50, p95, p99 = (float(np.percentile(values, percent)) for percent in (50, 95, 99))
    failures = sum(bool(s.failure) for s in some)
    return Row(kind, measure, len(some), failures, float(np.mean(values)), p50, p95, p99)
