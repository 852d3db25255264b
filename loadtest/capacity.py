"""How much a configuration can take, and what a target needs.

    python loadtest/capacity.py find http://127.0.0.1:8000 --low 1 --high 64
    python loadtest/capacity.py plan results/capacity/capacity.json --rate 200 \\
        --gpu-hour 2.5 --cpu-hour 0.05

`find` runs the scenario (`steady` by default, an open loop) at one rate after the other, halving
the distance between the highest rate that keeps every SLO of slo.yaml and the lowest that does not,
until they are within 10%. Then it says which stage is short, by the server's own figures.

`plan` takes what one replica of each stage did at that rate. The stage that is short can do no
more; another stage as much more as it was idle. Each gets replicas for --rate at --utilization.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from load import samples, server_series
from load.report import summary
from load.server_series import STAGES, Point

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
PRECISION = 1.1
FILE = "capacity.json"


@dataclass(frozen=True)
class Capacity:
    """What `find` found."""

    rate: float  # right answers a second of the best run that kept all SLOs
    level: float  # arrivals a second of that run; a chat is one, and several requests
    missed_at: float  # the fewest arrivals a second that did not keep them
    short: str | None  # the stage, if the server told
    replicas: dict[str, float]  # of each stage, in the mean, at `rate`
    busy: dict[str, float]  # seconds of work a second of each stage, all replicas together


def highest(keeps: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """The highest rate that keeps the SLOs, and the lowest that does not, within PRECISION.

    Raises:
        ValueError: `low` does not keep them, or `high` does.
    """
    if not keeps(low):
        raise ValueError(f"not even {low:g} requests a second keep the SLOs: try a lower --low")
    if keeps(high):
        raise ValueError(f"{high:g} requests a second still keep the SLOs: try a higher --high")
    while high / low > PRECISION:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low, high


def short_stage(points: Sequence[Point]) -> str | None:
    """The stage in front of which requests waited longest, in the second half of a run."""
    waits = _means(points, "queue seconds")
    return max(waits, key=waits.__getitem__) if waits else None


@dataclass(frozen=True)
class Need:
    """What a stage needs for a target rate."""

    stage: str
    per_replica: float  # requests a second that one can do
    replicas: int
    gpus: float


def plan(found: Capacity, rate: float, utilization: float, gpus: dict[str, float]) -> list[Need]:
    """`gpus` are those of one replica of a stage.

    Raises:
        ValueError: the server has not told how busy its stages were.
    """
    if found.short is None:
        raise ValueError("the server has told nothing about its stages: nothing to plan with")
    full = found.busy[found.short] / found.replicas[found.short]
    needs = []
    for stage in STAGES:
        share = found.busy[stage] / found.replicas[stage] / full  # of what it could do
        # A stage that had nothing to do is enough as it is.
        per_replica = found.rate / found.replicas[stage] / min(1.0, share) if share else math.inf
        replicas = max(1, math.ceil(rate / utilization / per_replica - 1e-9))
        needs.append(Need(stage, per_replica, replicas, replicas * gpus.get(stage, 0.0)))
    return needs


def per_million(
    needs: Sequence[Need], rate: float, gpu_hour: float, cpu_hour: float, cpus: float
) -> float:
    """What a million requests cost at `rate`; `cpus` of each replica, prices of an hour."""
    hour = sum(need.gpus * gpu_hour + need.replicas * cpus * cpu_hour for need in needs)
    return hour / (rate * 3600) * 1e6


# -- the commands ----------------------------------------------------------------------------------


def find(args: argparse.Namespace) -> None:
    def keeps(rate: float) -> bool:
        return run(args, rate) == 0

    low, high = highest(keeps, args.low, args.high)
    best, worse = (
        server_series.read(folder(args, rate) / server_series.FILE) for rate in (low, high)
    )
    result = Capacity(
        done(folder(args, low)),
        low,
        high,
        short_stage(worse),
        _means(best, "replicas"),
        _means(best, "busy"),
    )
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / FILE).write_text(json.dumps(asdict(result), indent=1) + "\n")
    print(f"{low:.2f} arrivals a second keep all SLOs, {high:.2f} do not")
    print(f"{result.rate:.2f} requests a second are answered then")
    print(f"short: {result.short or 'unknown, since the server has no metrics of blip2-serve'}")


def run(args: argparse.Namespace, rate: float) -> int:
    """locust's exit code: 0 if all SLOs were kept."""
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless"]
    command += ["--only-summary", "--host", args.url, "--scenario", args.scenario]
    command += ["--level", f"{rate:g}", "--seconds", f"{args.seconds:g}"]
    command += ["--output", str(folder(args, rate))]
    print(f"{rate:.2f} arrivals a second", flush=True)
    folder(args, rate).mkdir(parents=True, exist_ok=True)
    with (folder(args, rate) / "locust.log").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    if code not in (0, 1):
        raise SystemExit(f"locust failed: {log.name} says why")
    print("  keeps all SLOs" if code == 0 else "  misses some", flush=True)
    return code


def folder(args: argparse.Namespace, rate: float) -> Path:
    path: Path = args.output / f"{rate:.2f}"
    return path


def series(path: Path) -> list[Point]:
    return server_series.read(path / server_series.FILE)


def done(path: Path) -> float:
    """Right answers a second of a run."""
    run_file: dict[str, Any] = json.loads((path / "run.json").read_text())
    return summary(run_file, samples.read(path / samples.FILE)).requests_per_s


def show_plan(args: argparse.Namespace) -> None:
    found = Capacity(**json.loads(args.capacity.read_text()))
    gpus = {"encoder": args.encoder_gpus, "generator": args.generator_gpus}
    needs = plan(found, args.rate, args.utilization, gpus)
    print(f"{'stage':14}{'requests/s each':>16}{'replicas':>10}{'GPUs':>8}")
    for need in needs:
        print(f"{need.stage:14}{need.per_replica:16.2f}{need.replicas:10}{need.gpus:8.1f}")
    cost = per_million(needs, args.rate, args.gpu_hour, args.cpu_hour, args.cpus)
    print(f"a million requests: {cost:.2f} (in the currency of the prices)")


def _means(points: Sequence[Point], name: str) -> dict[str, float]:
    """By stage, in the second half of the run."""
    some = [p for p in points if p.name == name]
    if not some:
        return {}
    half = (some[0].time + some[-1].time) / 2
    late = [p for p in some if p.time >= half]
    return {
        stage: fmean(p.value for p in late if p.stage == stage)
        for stage in STAGES
        if any(p.stage == stage for p in late)
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    finding = commands.add_parser("find", help="the highest rate that keeps the SLOs")
    finding.add_argument("url")
    finding.add_argument("--scenario", default="steady")
    finding.add_argument("--low", type=float, default=1)
    finding.add_argument("--high", type=float, default=64)
    finding.add_argument("--seconds", type=float, default=60, help="of each run")
    finding.add_argument("--output", type=Path, default=Path("results/capacity"))
    finding.set_defaults(command=find)
    planning = commands.add_parser("plan", help="replicas, GPUs and cost for a target rate")
    planning.add_argument("capacity", type=Path, help="what `find` has written")
    planning.add_argument("--rate", type=float, required=True, help="requests a second")
    planning.add_argument("--utilization", type=float, default=0.7, help="of what replicas can do")
    planning.add_argument("--encoder-gpus", type=float, default=1, help="of one replica")
    planning.add_argument("--generator-gpus", type=float, default=1)
    planning.add_argument("--cpus", type=float, default=1, help="of one replica of any stage")
    planning.add_argument("--gpu-hour", type=float, default=0, help="price of an hour")
    planning.add_argument("--cpu-hour", type=float, default=0)
    planning.set_defaults(command=show_plan)
    args = parser.parse_args()
    try:
        args.command(args)
    except ValueError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
