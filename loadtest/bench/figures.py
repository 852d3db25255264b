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

# One server at one concurrency, by name. Missing are latencies if no answer ended in the window,
# figures of streams if none was streamed, and the memory of a server that runs elsewhere.
Figures = dict[str, float]

# Of the table: title, figures, format. "gap" is between chunks with text, "token" the mean gap per
# token of each answer.
COLUMNS = (
    ("req/s", ("requests_per_s",), ".2f"),
    ("tokens/s", ("tokens_per_s",), ".0f"),
    ("latency p50 / p99 s", ("latency_p50_s", "latency_p99_s"), ".2f"),
    ("first text p50 / p99 s", ("first_text_p50_s", "first_text_p99_s"), ".2f"),
    ("between texts p50 / p99 ms", ("gap_p50_ms", "gap_p99_ms"), ".0f"),
    ("per token p50 / p99 ms", ("token_p50_ms", "token_p99_ms"), ".0f"),
    ("memory GB", ("memory_peak_gb",), ".2f"),
)


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
    found = {"requests_per_s": requests, "tokens_per_s": tokens}
    for name, some in values.items():
        if some:
            names = name.format("p50"), name.format("p99")
            found |= zip(names, percentiles(some, 50, 99), strict=True)
    return found if memory_peak is None else found | {"memory_peak_gb": memory_peak / 1e9}


def medians(measurements: Iterable[Measurement]) -> dict[tuple[str, int], Figures]:
    """The median of each figure over rounds, by entry and concurrency."""
    values: dict[tuple[str, int], dict[str, list[float]]] = {}
    for m in measurements:
        own = values.setdefault((m.entry, m.concurrency), {})
        for name, value in m.figures.items():
            own.setdefault(name, []).append(value)
    return {
        key: {name: statistics.median(some) for name, some in own.items()}
        for key, own in values.items()
    }


def ratios(measurements: Sequence[Measurement]) -> list[Ratio]:
    """Every entry against the monolith, and streaming against the same server without it."""
    speeds = {(m.entry, m.concurrency, m.round): m.figures["requests_per_s"] for m in measurements}
    found: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    for (entry, users, number), speed in speeds.items():
        for base in (MONOLITH, entry.removesuffix(STREAM)):
            if base != entry and (base, users, number) in speeds:
                pair = speed, speeds[base, users, number]
                found.setdefault((entry, base, users), []).append(pair)
    return [Ratio(*key, median_ratio(pairs)) for key, pairs in found.items()]


def table(medians: dict[tuple[str, int], Figures], ratios: Sequence[Ratio]) -> str:
    """Markdown with a row for each server and concurrency."""
    rows = []
    for (entry, users), found in sorted(medians.items(), key=lambda item: item[0][1]):
        cells = [
            " / ".join(f"{found[name]:{form}}" for name in names if name in found)
            for _, names, form in COLUMNS
        ]
        own = [r for r in ratios if (r.of, r.concurrency) == (entry, users)]
        rows.append([entry, str(users), *cells, ", ".join(f"{r.ratio:.2f} x {r.to}" for r in own)])
    return markdown_table(["server", "users", *(title for title, *_ in COLUMNS), "ratio"], rows)


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
        speeds = [medians[entry, users]["requests_per_s"] for users in levels]
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
