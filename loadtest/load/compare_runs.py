"""Compares two load tests, and says which differences exceed chance.

    python -m loadtest.load.compare_runs results/before results/after
    python -m loadtest.load.compare_runs results/a-1,results/a-2 results/b-1,results/b-2

Prints the median and p95 of each kind and measure on both sides, their ratio, and the interval that
holds 95% of 2,000 resamplings. A resampling draws runs, and ten-second stretches of each run, with
replacement: requests close in time met the same load, so they are drawn together. A difference is
marked if its interval excludes 1. Only several runs per side show how much runs differ from each
other; with one run per side, the output says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loadtest.load import samples
from loadtest.load.samples import Measure, Sample
from loadtest.stats import percentiles

STRETCH_S = 10.0
RESAMPLINGS = 2_000
STATISTICS = {"p50": 50.0, "p95": 95.0}

Values = NDArray[np.float64]
Run = list[Values]  # one kind and measure, by stretch


@dataclass(frozen=True)
class Difference:
    """One statistic on both sides; `ratio` is b / a, and `low` to `high` its interval."""

    kind: str
    measure: Measure
    statistic: str
    a: float
    b: float
    ratio: float
    low: float
    high: float

    @property
    def is_real(self) -> bool:
        return not self.low <= 1 <= self.high


def differences(
    a: Sequence[Sequence[Sample]], b: Sequence[Sequence[Sample]], seed: int = 0
) -> list[Difference]:
    """Compares the runs of both sides in the kinds and measures that both have."""
    rng = np.random.default_rng(seed)
    keys = sorted({(s.kind, s.measure) for s in a[0]} & {(s.kind, s.measure) for s in b[0]})
    found = []
    for kind, measure in keys:
        runs_a, runs_b = ([_stretches(run, kind, measure) for run in side] for side in (a, b))
        drawn_a, drawn_b = (_resample(runs, rng) for runs in (runs_a, runs_b))
        of_a, of_b = (_percentiles([v for run in runs for v in run]) for runs in (runs_a, runs_b))
        for column, name in enumerate(STATISTICS):
            low, high = percentiles(drawn_b[:, column] / drawn_a[:, column], 2.5, 97.5)
            x, y = of_a[column], of_b[column]
            found.append(Difference(kind, measure, name, x, y, y / x, low, high))
    return found


def _stretches(run: Sequence[Sample], kind: str, measure: Measure) -> Run:
    start = min(s.time for s in run)
    found: dict[int, list[float]] = {}
    for s in run:
        if (s.kind, s.measure) == (kind, measure):
            found.setdefault(int((s.time - start) // STRETCH_S), []).append(s.value)
    return [np.array(values) for values in found.values()]


def _resample(runs: Sequence[Run], rng: np.random.Generator) -> Values:
    """STATISTICS of each resampling, [RESAMPLINGS, len(STATISTICS)]."""
    found = np.empty((RESAMPLINGS, len(STATISTICS)))
    for row in found:
        drawn = [runs[j] for j in rng.integers(len(runs), size=len(runs))]
        row[:] = _percentiles(
            [run[j] for run in drawn for j in rng.integers(len(run), size=len(run))]
        )
    return found


def _percentiles(stretches: Sequence[Values]) -> tuple[float, ...]:
    return percentiles(np.concatenate(stretches), *STATISTICS.values())


def table(found: Sequence[Difference]) -> str:
    lines = [f"{'kind':16}{'measure':14}{'':6}{'A':>10}{'B':>10}{'B / A':>8}   95% of resamplings"]
    for d in found:
        mark = "  <-- more than chance" if d.is_real else ""
        lines.append(
            f"{d.kind:16}{d.measure:14}{d.statistic:6}{d.a:10.4g}{d.b:10.4g}{d.ratio:8.2f}"
            f"   {d.low:.2f} to {d.high:.2f}{mark}"
        )
    return "\n".join(lines)


def _read(parser: argparse.ArgumentParser, folder: Path) -> list[samples.Sample]:
    path = folder / samples.FILE
    if not path.is_file():
        parser.error(f"{path} does not exist: name the --output folder of a load test")
    return samples.read(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", help="folder of a run, or several separated by commas")
    parser.add_argument("b", help="the other side")
    args = parser.parse_args()
    a, b = (
        [_read(parser, Path(folder)) for folder in side.split(",")] for side in (args.a, args.b)
    )
    print(table(differences(a, b)))
    if min(len(a), len(b)) == 1:
        print("one run per side: the intervals do not show how much runs differ from each other")


if __name__ == "__main__":
    main()
