"""The server's own figures during a run, from pages of its /metrics."""

from __future__ import annotations

import csv
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from blip2_serve.observe import metrics

FILE = "server.csv"
STAGES = ("preprocessor", "encoder", "generator")

# A replica's figures reach its node's page every ten seconds: what has grown is compared over a
# multiple of that, in which each replica has reported as often as any other.
REPORTED_EVERY_S, WINDOW_S = 10.0, 20.0

# Names as the page has them. Occupancy is the share of a batch's places that were taken.
STATES = {
    "waiting": metrics.QUEUE_DEPTH.exported,
    "running": metrics.SEQUENCES_RUNNING.exported,
    "KV rows used": metrics.KV_SLOTS_USED.exported,
    "KV rows": metrics.KV_SLOTS_CAPACITY.exported,
}
QUOTIENTS = {
    "queue seconds": (
        metrics.QUEUE_TIME.exact_sum.exported,
        f"{metrics.QUEUE_TIME.exported}_count",
    ),
    "occupancy": (metrics.BATCH_SIZE.exact_sum.exported, metrics.BATCH_CAPACITY.exported),
}
# Seconds of work; "busy" is by how much they grow in a second, all replicas and threads together.
WORK = {
    "preprocessor": metrics.IMAGE_DECODE_TIME.exact_sum.exported,
    "encoder": metrics.STEP_DURATION.exact_sum.exported,
    "generator": metrics.STEP_DURATION.exact_sum.exported,
}
REPLICA_HEALTHY = "ray_serve_deployment_replica_healthy"

Totals = dict[tuple[str, str], float]  # by metric and stage, summed over replicas


@dataclass(frozen=True)
class Point:
    """One figure at one time, in seconds since 1970."""

    time: float
    name: str  # such as "queue seconds"
    stage: str
    value: float


@dataclass
class ServerSeries:
    """Made of one page after the other."""

    points: list[Point] = field(default_factory=list)
    _pages: deque[tuple[float, Totals]] = field(default_factory=deque)

    def add(self, page: str, now: float) -> None:
        """What a page says, compared with one of WINDOW_S before. `now` in seconds since 1970.

        Raises:
            ValueError: it is no page of metrics.
        """
        self.points += self._read(page, now)

    def _read(self, page: str, now: float) -> list[Point]:
        totals, replicas = _totals(page)
        self._pages.append((now, totals))
        while len(self._pages) > 1 and self._pages[1][0] <= now - WINDOW_S:
            self._pages.popleft()
        then, before = self._pages[0]

        def grown(metric: str, stage: str) -> float:
            return totals.get((metric, stage), 0.0) - before.get((metric, stage), 0.0)

        points = [Point(now, "replicas", stage, count) for stage, count in replicas.items()]
        for name, metric in STATES.items():
            points += [
                Point(now, name, stage, value)
                for (found, stage), value in totals.items()
                if found == metric
            ]
        if now - then < REPORTED_EVERY_S:
            return points
        for stage in STAGES:
            points.append(Point(now, "busy", stage, grown(WORK[stage], stage) / (now - then)))
            for name, (above, below) in QUOTIENTS.items():
                if count := grown(below, stage):
                    points.append(Point(now, name, stage, grown(above, stage) / count))
        return points


def _totals(page: str) -> tuple[Totals, dict[str, float]]:
    """Sums over replicas, and how many replicas each stage has."""
    totals: Totals = {}
    replicas: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            deployment = sample.labels.get("deployment", "").lower()
            if sample.name == REPLICA_HEALTHY and deployment in STAGES:
                replicas[deployment] = replicas.get(deployment, 0.0) + sample.value
            elif sample.name.startswith(metrics.EXPORT_PREFIX + "blip2_"):
                key = sample.name, deployment
                totals[key] = totals.get(key, 0.0) + sample.value
    return totals, replicas


def write(path: Path, points: list[Point]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("time", "name", "stage", "value"))
        writer.writerows((p.time, p.name, p.stage, p.value) for p in points)


def read(path: Path) -> list[Point]:
    """Nothing, if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            Point(float(row["time"]), row["name"], row["stage"], float(row["value"]))
            for row in csv.DictReader(file)
        ]
