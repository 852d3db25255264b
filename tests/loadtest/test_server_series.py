"""The server's own figures, from pages of its metrics."""

from __future__ import annotations

from pathlib import Path

import pytest

from blip2_serve.observe import metrics
from loadtest.load import server_series
from loadtest.load.server_series import Point, ServerSeries


def page(*, waited: float, requests: int, worked: float, taken: float, places: float) -> str:
    """Of a generator with two replicas, which report half each, and an encoder with one."""
    lines = []
    for replica in ("a", "b"):
        labels = f'application="x",deployment="Generator",replica="{replica}"'
        queue = f'{labels},stage="generator"'
        lines += [
            f"{metrics.QUEUE_TIME.exact_sum.exported}{{{queue}}} {waited / 2}",
            f"{metrics.QUEUE_TIME.exported}_count{{{queue}}} {requests / 2}",
            f'{metrics.STEP_DURATION.exact_sum.exported}{{{labels},phase="decode"}} {worked / 2}',
            f"{metrics.BATCH_SIZE.exact_sum.exported}{{{queue}}} {taken / 2}",
            f"{metrics.BATCH_CAPACITY.exported}{{{queue}}} {places / 2}",
            f"{metrics.KV_SLOTS_USED.exported}{{{labels}}} 100",
            f"ray_serve_deployment_replica_healthy{{{labels}}} 1",
        ]
    lines.append('ray_serve_deployment_replica_healthy{deployment="Encoder",replica="c"} 1')
    return "\n".join(lines) + "\n"


def test_growth_from_page_to_page_is_added_up_over_replicas() -> None:
    series = ServerSeries()

    series.add(page(waited=10, requests=100, worked=5, taken=50, places=640), 1000.0)
    series.add(page(waited=16, requests=104, worked=8, taken=82, places=704), 1020.0)

    found = {(p.time, p.name, p.stage): p.value for p in series.points}
    assert found[1000.0, "replicas", "generator"] == 2
    assert found[1000.0, "replicas", "encoder"] == 1
    assert found[1000.0, "KV slots used", "generator"] == 200
    assert (1000.0, "queue seconds", "generator") not in found  # nothing to compare with yet
    assert found[1020.0, "queue seconds", "generator"] == pytest.approx(1.5)
    assert found[1020.0, "occupancy", "generator"] == pytest.approx(0.5)
    assert found[1020.0, "busy", "generator"] == pytest.approx(3 / 20)
    assert (1020.0, "queue seconds", "encoder") not in found


def test_work_that_is_reported_now_and_then_is_spread_over_the_time_that_it_took() -> None:
    """Half a second of work a second, which the page has every ten seconds only."""
    series = ServerSeries()

    for second in range(0, 100, 2):
        worked = 5.0 * (second // 10)
        series.add(page(waited=0, requests=0, worked=worked, taken=0, places=0), 1000.0 + second)

    busy = [p.value for p in series.points if p.name == "busy" and p.stage == "generator"]
    assert len(busy) > 40
    assert busy[5:] == pytest.approx([0.5] * len(busy[5:]))


def test_a_page_of_another_server_says_nothing() -> None:
    series = ServerSeries()

    series.add("vllm:num_requests_running 3\n", 1000.0)

    assert series.points == []


def test_points_come_back_from_their_file(tmp_path: Path) -> None:
    points = [Point(1.5, "busy", "encoder", 0.25)]

    server_series.write(tmp_path / "server.csv", points)

    assert server_series.read(tmp_path / "server.csv") == points
    assert server_series.read(tmp_path / "none.csv") == []
