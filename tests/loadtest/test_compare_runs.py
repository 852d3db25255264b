"""Differences between runs are told from chance."""

from __future__ import annotations

import numpy as np

from loadtest.load import compare_runs
from loadtest.load.compare_runs import differences
from loadtest.load.samples import Sample


def run(seed: int, factor: float = 1.0, seconds: int = 300) -> list[Sample]:
    """Two requests per second, with latencies that correlate within ten seconds."""
    rng = np.random.default_rng(seed)
    found = []
    for stretch in range(seconds // 10):
        load = rng.lognormal(0.0, 0.15)
        for i in range(20):
            latency = factor * load * rng.lognormal(0.0, 0.4)
            found.append(Sample(stretch * 10 + i / 2, "caption", "latency", latency))
    return found


def test_two_runs_of_the_same_server_are_rarely_called_different() -> None:
    called = sum(
        difference.is_real
        for seed in range(20)
        for difference in differences([run(2 * seed)], [run(2 * seed + 1)], seed)
    )
    assert called <= 4  # of 40


def test_a_server_that_takes_1_5_times_as_long_is_called_slower() -> None:
    found = differences([run(1), run(2)], [run(3, 1.5), run(4, 1.5)])

    assert [(d.kind, d.measure, d.statistic) for d in found] == [
        ("caption", "latency", "p50"),
        ("caption", "latency", "p95"),
    ]
    assert all(d.is_real and d.ratio > 1.2 and d.low > 1 for d in found)


def test_runs_that_differ_among_themselves_widen_the_interval() -> None:
    alone = differences([run(1)], [run(3, 1.3)])[0]
    unsure = differences([run(1), run(2, 1.4)], [run(3, 1.3), run(4, 0.9)])[0]

    assert alone.is_real
    assert not unsure.is_real


def test_the_table_marks_what_is_more_than_chance() -> None:
    lines = compare_runs.table(differences([run(1)], [run(3, 2.0)])).splitlines()

    assert len(lines) == 3
    assert all("more than chance" in line for line in lines[1:])
