"""What one window and many rounds say: figures, medians, ratios, the table and the plot."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.client import Window
from bench.servers import MONOLITH

STREAM = ":stream"


@dataclass(frozen=True)
class Figures:
    """One server at one concurrency.

    None: no answer ended in the window, none was streamed, or the memory is not ours to look at.
    """

    requests_per_s: float
    tokens_per_s: float
    latency_p50_s: float | None
    latency_p99_s: float | None
    first_text_p50_s: float | None = None
    first_text_p99_s: float | None = None
    # Between chunks with text; and of each answer (last - first) / (tokens - 1).
    gap_p50_ms: float | None = None
    gap_p99_ms: float | None = None
    token_p50_ms: float | None = None
    token_p99_ms: float | None = None
    memory_peak_gb: float | None = None


@dataclass(frozen=True)
class Measurement:
    """`entry` is a server's name, with STREAM behind it where it was asked to stream."""

    entry: str
    round: int
    concurrency: int
    answers: int  # those that ended in the window, which latencies are taken from
    figures: Figures


@dataclass(frozen=True)
class Ratio:
    """`of` is so many times as fast as `to`: requests per second, median over rounds."""

    of: str
    to: str
    concurrency: int
    ratio: float


def figures(window: Window, memory_peak: int | None) -> Figures:
    """What a window says. `memory_peak` is in bytes."""
    requests, tokens = window.per_second()
    inside = window.ended_inside()
    latencies = [a.ended - a.started for a in inside]
    streamed = [a for a in inside if a.texts]
    first = [a.texts[0] - a.started for a in streamed]
    gaps = [1e3 * gap for a in streamed for gap in np.diff(a.texts)]
    spans = [1e3 * (a.texts[-1] - a.texts[0]) / (a.tokens - 1) for a in streamed]
    return Figures(
        requests_per_s=requests,
        tokens_per_s=tokens,
        latency_p50_s=_percentile(latencies, 50),
        latency_p99_s=_percentile(latencies, 99),
        first_text_p50_s=_percentile(first, 50),
        first_text_p99_s=_percentile(first, 99),
        gap_p50_ms=_percentile(gaps, 50),
        gap_p99_ms=_percentile(gaps, 99),
        token_p50_ms=_percentile(spans, 50),
        token_p99_ms=_percentile(spans, 99),
        memory_peak_gb=None if memory_peak is None else memory_peak / 1e9,
    )


def medians(measurements: Iterable[Measurement]) -> dict[tuple[str, int], Figures]:
    """By entry and concurrency, of each figure the median over rounds."""
    rounds: dict[tuple[str, int], list[Figures]] = {}
    for m in measurements:
        rounds.setdefault((m.entry, m.concurrency), []).append(m.figures)
    return {key: _median(several) for key, several in rounds.items()}


def ratios(measurements: Sequence[Measurement]) -> list[Ratio]:
    """Everything against the monolith, and streaming against the same server without.

    Ratios are taken within each round, where the machine was the same, and then their median.
    """
    speeds = {(m.entry, m.concurrency, m.round): m.figures.requests_per_s for m in measurements}
    found: dict[tuple[str, str, int], list[float]] = {}
    for (entry, users, number), speed in speeds.items():
        for base in (MONOLITH, entry.removesuffix(STREAM)):
            if base != entry and (base, users, number) in speeds:
                ratio = speed / speeds[base, users, number]
                found.setdefault((entry, base, users), []).append(ratio)
    return [
        Ratio(entry, base, users, statistics.median(values))
        for (entry, base, users), values in found.items()
    ]


def table(medians: dict[tuple[str, int], Figures], ratios: Sequence[Ratio]) -> str:
    """Markdown, a row for each server and concurrency."""
    head = (
        "| users | server | req/s | tokens/s | latency p50 / p99 s | first text p50 / p99 s "
        "| between texts p50 / p99 ms | per token p50 / p99 ms | memory GB | times |"
    )
    rows = [head, "|---:|---|" + "---:|" * 8]
    for (entry, users), f in sorted(medians.items(), key=lambda item: item[0][1]):
        cells = [
            str(users),
            entry,
            f"{f.requests_per_s:.2f}",
            f"{f.tokens_per_s:.0f}",
            _pair(f.latency_p50_s, f.latency_p99_s, ".2f"),
            _pair(f.first_text_p50_s, f.first_text_p99_s, ".2f"),
            _pair(f.gap_p50_ms, f.gap_p99_ms, ".0f"),
            _pair(f.token_p50_ms, f.token_p99_ms, ".0f"),
            "" if f.memory_peak_gb is None else f"{f.memory_peak_gb:.2f}",
            ", ".join(
                f"{r.ratio:.2f} x {r.to}" for r in ratios if (r.of, r.concurrency) == (entry, users)
            ),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def plot(
    medians: dict[tuple[str, int], Figures], ratios: Sequence[Ratio], title: str, file: Path
) -> None:
    """Bars of requests per second, with each server's ratio to the monolith."""
    import matplotlib as mpl  # only here: tests of the rest do without it

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    entries = list(dict.fromkeys(entry for entry, _ in medians))
    levels = sorted({users for _, users in medians})
    labels = {(r.of, r.concurrency): f"{r.ratio:.2f}x" for r in ratios if r.to == MONOLITH}
    width = 0.8 / len(entries)
    size = (2 + 0.8 * len(levels) * len(entries), 4.5)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    for i, entry in enumerate(entries):
        places = [level + (i - (len(entries) - 1) / 2) * width for level in range(len(levels))]
        speeds = [medians[entry, users].requests_per_s for users in levels]
        bars = axes.bar(places, speeds, 0.94 * width, label=entry)
        axes.bar_label(bars, [f"{speed:.2f}" for speed in speeds], label_type="center")
        axes.bar_label(bars, [labels.get((entry, users), "") for users in levels], padding=2)
    axes.set_xticks(range(len(levels)), [f"{users} user{'s'[: users > 1]}" for users in levels])
    axes.set_ylabel("requests per second")
    axes.set_title(title, fontsize="medium")
    axes.margins(y=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=len(entries))
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _median(several: Sequence[Figures]) -> Figures:
    def of(name: str) -> float | None:
        values = [v for f in several if (v := getattr(f, name)) is not None]
        return statistics.median(values) if values else None

    return Figures(**{name: of(name) for name in Figures.__dataclass_fields__})


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None


def _pair(a: float | None, b: float | None, form: str) -> str:
    return "" if a is None or b is None else f"{a:{form}} / {b:{form}}"
