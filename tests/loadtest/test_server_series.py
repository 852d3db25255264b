"""The server's own figures, read from its /metrics."""

from __future__ import annotations

from pathlib import Path

import pytest

from blip2_serve.observe import metrics
from loadtest.load import server_series
from loadtest.load.server_series import Point, ServerSeries


def page(*, waited: float, requests: int, worked: float, taken: float, places: float) -> str:
    """Two replicas of the generator, which report half each, and one of the encoder."""
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


def test_growth_between_pages_is_summed_over_replicas() -> None:
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


def test_work_reported_in_bursts_is_spread_over_its_time() -> None:
    """Half a second of work per second, reported only every ten seconds."""
    series = ServerSeries()

    for second in range(0, 100, 2):
        worked = 5.0 * (second // 10)
        series.add(page(waited=0, requests=0, worked=worked, taken=0, places=0), 1000.0 + second)

    busy = [p.value for p in series.points if p.name == "busy" and p.stage == "generator"]
    assert len(busy) > 40
    assert busy[5:] == pytest.approx([0.5] * len(busy[5:]))


def test_the_page_of_another_server_gives_no_points() -> None:
    series = ServerSeries()

    series.add("vllm:num_requests_running 3\n", 1000.0)

    assert series.points == []


def test_points_are_read_back_as_written(tmp_path: Path) -> None:
    points = [Point(1.5, "busy", "encoder", 0.25)]

    server_series.write(tmp_path / "server.csv", points)

    assert server_series.read(tmp_path / "server.csv") == points
    assert server_series.read(tmp_path / "none.csv") == []
