"""Two load tests side by side, and which of their differences are more than chance.

    python loadtest/compare.py results/before results/after
    python loadtest/compare.py results/before-1,results/before-2 results/after-1,results/after-2

For each kind and measure: median and p95 of both sides, and their ratio with the interval in which
95% of 2,000 resamplings lie. A resampling draws runs, and of each run stretches of ten seconds,
with replacement: what is near in time is drawn together, since it met the same load. A difference
is marked if 1 is outside of the interval. How much one run differs from the next on the same server
is only in it where a side has several; with one run a side, the output says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from load import samples
from load.samples import Measure, Sample

STRETCH_S = 10.0
RESAMPLINGS = 2_000
STATISTICS = {"p50": 50.0, "p95": 95.0}

Values = NDArray[np.float64]
Run = list[Values]  # of one kind and measure, by stretches


@dataclass(frozen=True)
class Difference:
    """B's figure by A's."""

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
    """Of the kinds and measures that both sides have; each side's runs."""
    rng = np.random.default_rng(seed)
    keys = sorted({(s.kind, s.measure) for s in a[0]} & {(s.kind, s.measure) for s in b[0]})
    found = []
    for kind, measure in keys:
        runs_a, runs_b = ([_stretches(run, kind, measure) for run in side] for side in (a, b))
        drawn_a, drawn_b = (_resampled(runs, rng) for runs in (runs_a, runs_b))
        for column, (name, percent) in enumerate(STATISTICS.items()):
            of_a, of_b = (_percentile(runs, percent) for runs in (runs_a, runs_b))
            ratios = drawn_b[:, column] / drawn_a[:, column]
            low, high = np.percentile(ratios, (2.5, 97.5))
            found.append(
                Difference(kind, measure, name, of_a, of_b, of_b / of_a, float(low), float(high))
            )
    return found


def _stretches(run: Sequence[Sample], kind: str, measure: Measure) -> Run:
    start = min(sample.time for sample in run)
    by_stretch: dict[int, list[float]] = {}
    for sample in run:
        if (sample.kind, sample.measure) == (kind, measure):
            by_stretch.setdefault(int((sample.time - start) / STRETCH_S), []).append(sample.value)
    return [np.array(values) for values in by_stretch.values()]


def _resampled(runs: Sequence[Run], rng: np.random.Generator) -> Values:
    """[RESAMPLINGS, statistics]."""
    found = np.empty((RESAMPLINGS, len(STATISTICS)))
    for i in range(RESAMPLINGS):
        drawn = [runs[j] for j in rng.integers(len(runs), size=len(runs))]
        some = [run[j] for run in drawn for j in rng.integers(len(run), size=len(run))]
        found[i] = np.percentile(np.concatenate(some), [*STATISTICS.values()])
    return found


def _percentile(runs: Sequence[Run], percent: float) -> float:
    return float(np.percentile(np.concatenate([v for run in runs for v in run]), percent))


def table(found: Sequence[Difference]) -> str:
    lines = [f"{'kind':16}{'measure':14}{'':6}{'A':>10}{'B':>10}{'B / A':>8}   95% of resamplings"]
    for d in found:
        mark = "  <-- more than chance" if d.is_real else ""
        lines.append(
            f"{d.kind:16}{d.measure:14}{d.statistic:6}{d.a:10.4g}{d.b:10.4g}{d.ratio:8.2f}"
            f"   {d.low:.2f} to {d.high:.2f}{mark}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", help="folder of a run, or of several with commas between")
    parser.add_argument("b")
    args = parser.parse_args()
    a, b = (
        [samples.read(Path(folder) / samples.FILE) for folder in side.split(",")]
        for side in (args.a, args.b)
    )
    print(table(differences(a, b)))
    if min(len(a), len(b)) == 1:
        print("one run a side: how runs differ from each other is not in these intervals")


if __name__ == "__main__":
    main()
