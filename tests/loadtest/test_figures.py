"""Figures of a window, medians and ratios over rounds, table and plot."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.bench.client import Answer, Window
from loadtest.bench.figures import (
    Measurement,
    Ratio,
    figures,
    medians,
    plot,
    ratios,
    table,
)


def measured(entry: str, number: int, speed: float, users: int = 8) -> Measurement:
    figures = {
        "requests_per_s": speed,
        "tokens_per_s": 32 * speed,
        "latency_p50_s": 1.0,
        "latency_p99_s": 2.0,
    }
    return Measurement(entry, number, users, 100, figures)


ROUNDS = [
    measured("monolith", 0, 1.0),
    measured("blip2-serve", 0, 4.0),
    measured("blip2-serve:stream", 0, 2.0),
    # A round on a slower machine, in another order.
    measured("blip2-serve", 1, 1.0),
    measured("blip2-serve:stream", 1, 0.9),
    measured("monolith", 1, 0.2),
    measured("blip2-serve:stream", 2, 3.0),
    measured("monolith", 2, 1.0),
    measured("blip2-serve", 2, 6.0),
]


def test_ratios_are_medians_of_the_ratios_within_rounds() -> None:
    found = {(r.of, r.to): r.ratio for r in ratios(ROUNDS)}

    assert found == {
        ("blip2-serve", "monolith"): pytest.approx(5),  # of 4, 5 and 6
        ("blip2-serve:stream", "monolith"): pytest.approx(3),  # of 2, 4.5 and 3
        ("blip2-serve:stream", "blip2-serve"): pytest.approx(0.5),  # of 0.5, 0.9 and 0.5
    }


def test_ratios_need_both_servers_at_the_same_concurrency() -> None:
    alone = [measured("monolith", 0, 1.0, users=1), measured("blip2-serve", 0, 4.0, users=8)]

    assert ratios(alone) == []


def test_medians_skip_missing_figures() -> None:
    found = medians(ROUNDS)["blip2-serve", 8]

    assert found["requests_per_s"] == 4.0
    assert found["latency_p99_s"] == 2.0
    assert "first_text_p50_s" not in found


def test_figures_of_a_window_of_streams() -> None:
    texts = [(1.5, 2.0, 2.5, 3.0), (2.25, 3.0, 3.75)]
    answers = [
        Answer(1.0, 3.0, tokens=4, texts=texts[0]),
        Answer(2.0, 4.0, tokens=4, texts=texts[1]),
        Answer(3.0, 7.0, tokens=4, texts=(5.0, 6.0)),  # ends outside
    ]

    found = figures(Window(1.0, 5.0, answers), memory_peak=2_500_000_000)

    assert found["requests_per_s"] == pytest.approx(2.5 / 4)
    assert found["latency_p50_s"] == pytest.approx(2.0)
    assert found["first_text_p50_s"] == pytest.approx((0.5 + 0.25) / 2)
    assert found["gap_p50_ms"] == pytest.approx(500)  # of 500, 500, 500, 750 and 750
    assert found["token_p50_ms"] == pytest.approx(500)  # 1.5 s / 3 of both
    assert found["memory_peak_gb"] == 2.5


def test_figures_of_a_window_in_which_nothing_ended() -> None:
    found = figures(Window(1.0, 2.0, [Answer(0.0, 4.0, tokens=8)]), memory_peak=None)

    assert found["requests_per_s"] == pytest.approx(0.25)
    assert "latency_p50_s" not in found
    assert "memory_peak_gb" not in found


def test_the_table_has_a_row_for_each_server_and_concurrency() -> None:
    rows = table(medians(ROUNDS), [Ratio("blip2-serve", "monolith", 8, 5.0)]).splitlines()

    assert len({row.count("|") for row in rows}) == 1
    row = next(row for row in rows if "| blip2-serve |" in row)
    assert "| 4.00 | 128 | 1.00 / 2.00 |" in row
    assert row.endswith("| 5.00 x monolith |")


def test_the_plot_is_written(tmp_path: Path) -> None:
    plot(medians(ROUNDS), ratios(ROUNDS), "a title", tmp_path / "plot.png")

    assert (tmp_path / "plot.png").stat().st_size > 5_000
