"""The server's own figures during a run, read from its /metrics."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from blip2_serve.observe import metrics
from loadtest.results import read_csv, write_csv

FILE = "server.csv"
STAGES = ("preprocessor", "encoder", "generator")

# A replica's figures reach /metrics every ten seconds. Differences are taken over a multiple of
# that, in which each replica has reported equally often.
REPORTED_EVERY_S, WINDOW_S = 10.0, 20.0

STATES = {
    "waiting": metrics.QUEUE_DEPTH.exported,
    "running": metrics.SEQUENCES_RUNNING.exported,
    "KV slots used": metrics.KV_SLOTS_USED.exported,
    "KV slots": metrics.KV_SLOTS_CAPACITY.exported,
}
# Growth of one counter by the growth of another.
QUOTIENTS = {
    "queue seconds": (
        metrics.QUEUE_TIME.exact_sum.exported,
        f"{metrics.QUEUE_TIME.exported}_count",
    ),
    "occupancy": (metrics.BATCH_SIZE.exact_sum.exported, metrics.BATCH_CAPACITY.exported),
}
# Counters of seconds of work. "busy" is their growth per second over all replicas and threads.
WORK = {
    "preprocessor": metrics.IMAGE_DECODE_TIME.exact_sum.exported,
    "encoder": metrics.STEP_DURATION.exact_sum.exported,
    "generator": metrics.STEP_DURATION.exact_sum.exported,
}
REPLICA_HEALTHY = "ray_serve_deployment_replica_healthy"

Totals = dict[tuple[str, str], float]  # by metric and stage, summed over replicas


@dataclass(frozen=True)
class Point:
    """One figure at one time."""

    time: float  # seconds since 1970
    name: str  # such as "queue seconds"
    stage: str
    value: float


@dataclass
class ServerSeries:
    """Collects the points of one page after another."""

    points: list[Point] = field(default_factory=list)
    _pages: deque[tuple[float, Totals]] = field(default_factory=deque)

    def add(self, page: str, now: float) -> None:
        """Adds a page read at `now` (seconds since 1970).

        Raises:
            ValueError: it is not in Prometheus's format.
        """
        totals, replicas = _totals(page)
        self.points += [Point(now, "replicas", stage, count) for stage, count in replicas.items()]
        for name, metric in STATES.items():
            self.points += [
                Point(now, name, stage, value)
                for (found, stage), value in totals.items()
                if found == metric
            ]
        self._pages.append((now, totals))
        while len(self._pages) > 1 and self._pages[1][0] <= now - WINDOW_S:
            self._pages.popleft()
        self._add_growth()

    def _add_growth(self) -> None:
        """Compares the latest page with the earliest of the window."""
        (then, before), (now, totals) = self._pages[0], self._pages[-1]
        if now - then < REPORTED_EVERY_S:
            return

        def growth(metric: str, stage: str) -> float:
            return totals.get((metric, stage), 0.0) - before.get((metric, stage), 0.0)

        for stage in STAGES:
            busy = growth(WORK[stage], stage) / (now - then)
            self.points.append(Point(now, "busy", stage, busy))
            for name, (above, below) in QUOTIENTS.items():
                if count := growth(below, stage):
                    self.points.append(Point(now, name, stage, growth(above, stage) / count))


def _totals(page: str) -> tuple[Totals, dict[str, float]]:
    """Sums over replicas, and the number of replicas of each stage."""
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


def write(path: Path, points: Iterable[Point]) -> None:
    write_csv(path, Point, points)


def read(path: Path) -> list[Point]:
    """Empty if there is no such file."""
    return read_csv(path, Point) if path.exists() else []
