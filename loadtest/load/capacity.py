"""Finds how much load a configuration can take, and plans replicas for a target rate.

    python -m loadtest.load.capacity find http://127.0.0.1:8000 --low 1 --high 64
    python -m loadtest.load.capacity plan results/capacity/capacity.json --rate 200 \\
        --gpu-hour 2.5 --cpu-hour 0.05

`find` runs the scenario (an open loop, `steady` by default) at different rates. It bisects between
the highest rate that meets every SLO of slo.yaml and the lowest that does not, until they are
within 10%, and names the bottleneck by the server's own figures.

`plan` starts from what one replica of each stage did at that rate. The bottleneck's replicas were
at their limit; those of another stage could do as much more as they were less busy. Every stage
gets enough replicas for --rate at --utilization.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from loadtest.load import samples, server_series
from loadtest.load.report import summary
from loadtest.load.server_series import STAGES, Point
from loadtest.results import read_json, write_json

LOCUSTFILE = Path(__file__).parents[1] / "locustfile.py"
PRECISION = 1.1
FILE = "capacity.json"


@dataclass(frozen=True)
class Capacity:
    """The result of `find`."""

    rate: float  # right answers per second at the highest level that met all SLOs
    level: float  # arrivals per second there; a chat is one arrival of several requests
    missed_at: float  # the lowest level that missed an SLO
    bottleneck: str | None  # None: the server does not tell
    replicas: dict[str, float]  # mean number of each stage at `level`
    busy: dict[str, float]  # seconds of work per second of each stage, over all replicas


def highest(meets: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """The highest level that meets the SLOs and the lowest that does not, within PRECISION.

    Raises:
        ValueError: `low` misses them, or `high` meets them.
    """
    if not meets(low):
        raise ValueError(f"{low:g} requests per second already miss an SLO: try a lower --low")
    if meets(high):
        raise ValueError(f"{high:g} requests per second still meet all SLOs: try a higher --high")
    while high / low > PRECISION:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low, high


def bottleneck(points: Sequence[Point]) -> str | None:
    """The stage whose queue was longest in the second half of a run."""
    waits = _means(points, "queue seconds")
    return max(waits, key=waits.__getitem__) if waits else None


@dataclass(frozen=True)
class Need:
    """What a stage needs for a target rate."""

    stage: str
    per_replica: float  # requests per second that one replica can do
    replicas: int
    gpus: float


def plan(found: Capacity, rate: float, utilization: float, gpus: dict[str, float]) -> list[Need]:
    """Plans each stage; `gpus` is the number per replica of a stage.

    Raises:
        ValueError: the server did not tell how busy its stages were.
    """
    if found.bottleneck is None:
        raise ValueError("the server reported nothing about its stages, so they cannot be planned")
    full = found.busy[found.bottleneck] / found.replicas[found.bottleneck]
    needs = []
    for stage in STAGES:
        share = found.busy[stage] / found.replicas[stage] / full  # of the stage's own limit
        # One replica of an idle stage is enough.
        per_replica = found.rate / found.replicas[stage] / min(1.0, share) if share else math.inf
        replicas = max(1, math.ceil(rate / utilization / per_replica - 1e-9))
        needs.append(Need(stage, per_replica, replicas, replicas * gpus.get(stage, 0.0)))
    return needs


def per_million(
    needs: Sequence[Need], rate: float, gpu_hour: float, cpu_hour: float, cpus: float
) -> float:
    """The cost of a million requests at `rate`; `cpus` per replica, prices per hour."""
    hour = sum(need.gpus * gpu_hour + need.replicas * cpus * cpu_hour for need in needs)
    return hour / (rate * 3600) * 1e6


def _means(points: Sequence[Point], name: str) -> dict[str, float]:
    """A figure's mean in the second half of the run, by stage."""
    some = [p for p in points if p.name == name]
    if not some:
        return {}
    half = (some[0].time + some[-1].time) / 2
    late = {
        stage: [p.value for p in some if p.stage == stage and p.time >= half] for stage in STAGES
    }
    return {stage: fmean(values) for stage, values in late.items() if values}


# -- the commands ----------------------------------------------------------------------------------


def find(args: argparse.Namespace) -> None:
    def folder(level: float) -> Path:
        path: Path = args.output / f"{level:.2f}"
        return path

    low, high = highest(lambda level: run(args, level, folder(level)), args.low, args.high)
    best, worse = (server_series.read(folder(at) / server_series.FILE) for at in (low, high))
    done = summary(
        read_json(folder(low) / "run.json"), samples.read(folder(low) / samples.FILE)
    ).requests_per_s
    result = Capacity(
        done, low, high, bottleneck(worse), _means(best, "replicas"), _means(best, "busy")
    )
    write_json(args.output / FILE, asdict(result))
    print(f"{low:.2f} arrivals per second meet all SLOs, {high:.2f} do not")
    print(f"at {low:.2f}, the server answers {done:.2f} requests per second")
    print(f"bottleneck: {result.bottleneck or 'unknown, there are no metrics of blip2-serve'}")


def run(args: argparse.Namespace, level: float, folder: Path) -> bool:
    """Runs the scenario at this level. Returns whether it met all SLOs."""
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless"]
    command += ["--only-summary", "--host", args.url, "--scenario", args.scenario]
    command += ["--level", f"{level:g}", "--seconds", f"{args.seconds:g}", "--output", str(folder)]
    print(f"{level:.2f} arrivals per second: ", end="", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "locust.log").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    if code not in (0, 1):
        raise SystemExit(f"locust failed; see {log.name}")
    print("misses an SLO" if code else "meets all SLOs", flush=True)
    return code == 0


def show_plan(args: argparse.Namespace) -> None:
    found = Capacity(**read_json(args.capacity))
    gpus = {"encoder": args.encoder_gpus, "generator": args.generator_gpus}
    needs = plan(found, args.rate, args.utilization, gpus)
    print(f"{'stage':14}{'requests/s each':>16}{'replicas':>10}{'GPUs':>8}")
    for need in needs:
        print(f"{need.stage:14}{need.per_replica:16.2f}{need.replicas:10}{need.gpus:8.1f}")
    cost = per_million(needs, args.rate, args.gpu_hour, args.cpu_hour, args.cpus)
    print(f"a million requests cost {cost:.2f}, in the currency of the prices")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    finding = commands.add_parser("find", help="find the highest rate that meets the SLOs")
    finding.add_argument("url")
    finding.add_argument("--scenario", default="steady")
    finding.add_argument("--low", type=float, default=1, help="a rate that meets all SLOs")
    finding.add_argument("--high", type=float, default=64, help="a rate that misses one")
    finding.add_argument("--seconds", type=float, default=60, help="length of each run")
    finding.add_argument("--output", type=Path, default=Path("results/capacity"))
    finding.set_defaults(command=find)
    planning = commands.add_parser("plan", help="plan replicas, GPUs and cost for a target rate")
    planning.add_argument("capacity", type=Path, help="the capacity.json that `find` wrote")
    planning.add_argument("--rate", type=float, required=True, help="requests per second")
    for name, default, meaning in (
        ("utilization", 0.7, "target share of capacity"),
        ("encoder-gpus", 1, "GPUs per encoder"),
        ("generator-gpus", 1, "GPUs per generator"),
        ("cpus", 1, "CPUs per replica of any stage"),
        ("gpu-hour", 0, "price of a GPU per hour"),
        ("cpu-hour", 0, "price of a CPU per hour"),
    ):
        planning.add_argument(f"--{name}", type=float, default=default, help=meaning)
    planning.set_defaults(command=show_plan)
    args = parser.parse_args()
    try:
        args.command(args)
    except ValueError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
