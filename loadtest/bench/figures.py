"""The figures of the comparison: of one window, over rounds, as a table and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from loadtest import plotting
from loadtest.bench.client import Window
from loadtest.bench.servers import MONOLITH
from loadtest.results import markdown_table
from loadtest.stats import median_ratio, percentiles

STREAM = ":stream"


@dataclass(frozen=True)
class Figures:
    """One server at one concurrency.

    None: no answer ended in the window, none was streamed, or the server runs elsewhere.
    """

    requests_per_s: float
    tokens_per_s: float
    latency_p50_s: float | None
    latency_p99_s: float | None
    first_text_p50_s: float | None = None
    first_text_p99_s: float | None = None
    # Between chunks with text, and (last - first) / (tokens - 1) of each answer.
    gap_p50_ms: float | None = None
    gap_p99_ms: float | None = None
    token_p50_ms: float | None = None
    token_p99_ms: float | None = None
    memory_peak_gb: float | None = None


@dataclass(frozen=True)
class Measurement:
    """The figures of one round; `entry` is a server's name, with STREAM if it streamed."""

    entry: str
    round: int
    concurrency: int
    answers: int  # that ended in the window
    figures: Figures


@dataclass(frozen=True)
class Ratio:
    """`of` answers `ratio` times as many requests per second as `to`: the median over rounds."""

    of: str
    to: str
    concurrency: int
    ratio: float


def figures(window: Window, memory_peak: int | None) -> Figures:
    """The figures of a window; `memory_peak` is in bytes."""
    requests, tokens = window.per_second()
    inside = window.ended_inside()
    streamed = [a for a in inside if a.texts]
    values = {
        "latency_{}_s": [a.ended - a.started for a in inside],
        "first_text_{}_s": [a.texts[0] - a.started for a in streamed],
        "gap_{}_ms": [1e3 * gap for a in streamed for gap in np.diff(a.texts)],
        "token_{}_ms": [1e3 * (a.texts[-1] - a.texts[0]) / (a.tokens - 1) for a in streamed],
    }
    found: dict[str, float | None] = {}
    for name, some in values.items():
        p50, p99 = percentiles(some, 50, 99) if some else (None, None)
        found |= {name.format("p50"): p50, name.format("p99"): p99}
    found["memory_peak_gb"] = None if memory_peak is None else memory_peak / 1e9
    return Figures(requests, tokens, **found)


def medians(measurements: Iterable[Measurement]) -> dict[tuple[str, int], Figures]:
    """The median of each figure over rounds, by entry and concurrency."""
    rounds: dict[tuple[str, int], list[Figures]] = {}
    for m in measurements:
        rounds.setdefault((m.entry, m.concurrency), []).append(m.figures)
    return {key: _median(several) for key, several in rounds.items()}


def ratios(measurements: Sequence[Measurement]) -> list[Ratio]:
    """Every entry against the monolith, and streaming against the same server without it."""
    speeds = {(m.entry, m.concurrency, m.round): m.figures.requests_per_s for m in measurements}
    found: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    for (entry, users, number), speed in speeds.items():
        for base in (MONOLITH, entry.removesuffix(STREAM)):
            if base != entry and (base, users, number) in speeds:
                pair = speed, speeds[base, users, number]
                found.setdefault((entry, base, users), []).append(pair)
    return [Ratio(*key, median_ratio(pairs)) for key, pairs in found.items()]


def table(medians: dict[tuple[str, int], Figures], ratios: Sequence[Ratio]) -> str:
    """Markdown with a row for each server and concurrency."""
    head = (
        "server",
        "users",
        "req/s",
        "tokens/s",
        "latency p50 / p99 s",
        "first text p50 / p99 s",
        "between texts p50 / p99 ms",
        "per token p50 / p99 ms",
        "memory GB",
        "ratio",
    )
    rows = [
        (
            entry,
            str(users),
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
        )
        for (entry, users), f in sorted(medians.items(), key=lambda item: item[0][1])
    ]
    return markdown_table(head, rows)


def plot(
    medians: dict[tuple[str, int], Figures], ratios: Sequence[Ratio], title: str, file: Path
) -> None:
    """Bars of requests per second, each with its ratio to the monolith."""
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
    plotting.save(figure, file)


def _median(several: Sequence[Figures]) -> Figures:
    def of(name: str) -> float | None:
        values = [v for f in several if (v := getattr(f, name)) is not None]
        return statistics.median(values) if values else None

    return Figures(**{name: of(name) for name in Figures.__dataclass_fields__})  # type: ignore[arg-type]


def _pair(a: float | None, b: float | None, form: str) -> str:
    return "" if a is None or b is None else f"{a:{form}} / {b:{form}}"
