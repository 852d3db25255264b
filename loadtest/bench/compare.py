"""Servers under the same load, in alternating rounds: a table, results.json and plot.png.

    python loadtest/bench/compare.py --servers blip2-serve blip2-serve:stream monolith \\
        --concurrency 1 8 32 --rounds 3 --seconds 20 --output results/today
    python loadtest/bench/compare.py --servers blip2-serve --url vllm=http://127.0.0.1:8001

In each round every server is started, warmed up, driven at each concurrency, and stopped, one after
the other and in another order each time. Behind a name, ":stream" asks the server to stream.
Every answer is checked; the first wrong one ends the run. A random checkpoint of 108M parameters
in bfloat16 is written for the run, or into --checkpoint, where the next run finds it. Servers of
--url must serve the checkpoint that is compared.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import client, report, script, servers
from bench.checkpoint import checkpoint_at
from bench.machine import machine
from bench.report import STREAM, Measurement
from bench.workload import Workload

WARM_UP_USERS, WARM_UP_SERIES = 4, 0
REQUESTS_BESIDES = 6  # of each user at most, before the window opens and after it closes


def main() -> None:
    args = arguments()
    with script.failures_told(), checkpoint_at(args.checkpoint) as args.checkpoint:
        run(args)


def run(args: argparse.Namespace) -> None:
    """All rounds; results are written after each."""
    args.output.mkdir(parents=True, exist_ok=True)
    about = {"machine": machine(), "settings": settings(args)}
    workload = Workload(args.seed)
    measurements: list[Measurement] = []
    for number in range(args.rounds):
        turn = number % len(args.servers)
        for entry in args.servers[turn:] + args.servers[:turn]:
            for measurement in one_server(entry, number, workload, args):
                measurements.append(measurement)
                figures = measurement.figures
                print(
                    f"round {number + 1}, {entry}, {measurement.concurrency} users: "
                    f"{figures.requests_per_s:.2f} req/s, {figures.tokens_per_s:.0f} tokens/s",
                    flush=True,
                )
        write(about, measurements, args.output)
    medians, ratios = report.medians(measurements), report.ratios(measurements)
    report.plot(medians, ratios, title(about), args.output / "plot.png")
    print(f"\n{report.slots(medians, ratios)}\n\n{args.output}/results.json, plot.png")
    if workload.made_late:
        print(f"{workload.made_late} pictures were made while measuring: raise --most-per-second")


def one_server(
    entry: str, number: int, workload: Workload, args: argparse.Namespace
) -> Iterator[Measurement]:
    """One round of one server."""
    name, stream = entry.removesuffix(STREAM), entry.endswith(STREAM)
    with contextlib.ExitStack() as stack:
        if name in args.url:
            endpoint = servers.connect(args.url[name])
        else:
            log = args.output / "logs" / f"{entry.replace(':', '-')}-{number + 1}.log"
            endpoint = stack.enter_context(servers.running(name, args.checkpoint, log))
        workload.prepare(REQUESTS_BESIDES * WARM_UP_USERS)
        requests = workload.requests(WARM_UP_SERIES)
        asyncio.run(
            client.measure(endpoint, requests, users=WARM_UP_USERS, seconds=0, stream=stream)
        )
        for users in args.concurrency:
            inside = int(args.most_per_second * args.seconds)
            workload.prepare(inside + REQUESTS_BESIDES * users)
            requests = workload.requests(number, users)  # the same for all servers of a round
            with servers.PeakMemory(endpoint.process) as memory:
                window = asyncio.run(
                    client.measure(
                        endpoint, requests, users=users, seconds=args.seconds, stream=stream
                    )
                )
            figures = report.figures(window, memory.peak)
            yield Measurement(entry, number, users, len(window.ended_inside()), figures)


def write(about: dict[str, Any], measurements: list[Measurement], output: Path) -> None:
    results = {
        **about,
        "ratios": [dataclasses.asdict(ratio) for ratio in report.ratios(measurements)],
        "medians": [
            {"entry": entry, "concurrency": users, **dataclasses.asdict(figures)}
            for (entry, users), figures in report.medians(measurements).items()
        ],
        "measurements": [dataclasses.asdict(m) for m in measurements],
    }
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    named = ("servers", "concurrency", "rounds", "seconds", "seed")
    return {name: getattr(args, name) for name in named}


def title(about: dict[str, Any]) -> str:
    where, how = about["machine"], about["settings"]
    return (
        f"{where['cores']} cores of {where['cpu']}\n"
        f"{how['rounds']} x {how['seconds']:g} s, medians; above the bars: times the monolith"
    )


def arguments() -> argparse.Namespace:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument(
        "--servers",
        nargs="*",
        default=["blip2-serve", servers.MONOLITH],
        help=f"of {', '.join(servers.NAMES)} and the names of --url; ':stream' behind it streams",
    )
    parser.add_argument(
        "--url", nargs="*", default=[], help="NAME=http://host:port of a server that runs already"
    )
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32], help="users")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20, help="length of each window")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--most-per-second",
        type=float,
        default=20,
        help="requests per second that pictures are made in advance for",
    )
    parser.add_argument("--checkpoint", type=Path, help="a folder; written if there is none")
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()

    if not all("=" in url for url in args.url):
        parser.error("--url takes NAME=URL")
    args.url = dict(url.split("=", 1) for url in args.url)
    asked = {entry.removesuffix(STREAM) for entry in args.servers}
    args.servers += [name for name in args.url if name not in asked]
    for entry in args.servers:
        if entry.removesuffix(STREAM) not in {*servers.NAMES, *args.url}:
            parser.error(f"no server is called {entry}")
    if f"{servers.MONOLITH}{STREAM}" in args.servers:
        parser.error("the monolith does not stream")
    return args


if __name__ == "__main__":
    main()
