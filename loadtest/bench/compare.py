"""Compares servers under the same load in alternating rounds.

    python -m loadtest.bench.compare --servers blip2-serve blip2-serve:stream monolith \\
        --concurrency 1 8 32 --rounds 3 --seconds 20 --output results/today
    python -m loadtest.bench.compare --servers blip2-serve --url vllm=http://127.0.0.1:8001
    python -m loadtest.bench.compare --servers old new --checkpoint /tmp/blip2-108m \\
        --url old=http://127.0.0.1:8001 new=http://127.0.0.1:8002

Each round starts every server, warms it up, measures each concurrency, and stops it; the order
changes from round to round. Servers of --url are already running and must serve the same
checkpoint. ":stream" after a name requests streamed answers. Every answer is checked, and the first
wrong one, or a refusal, ends the run; so this project's servers let users wait (patient.yaml).
Prints a table, and writes results.json and plot.png.

The checkpoint has 108M random parameters in bfloat16. It is written to --checkpoint unless it is
there already, by default to a temporary folder.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loadtest.bench import client, figures, script, servers
from loadtest.bench.checkpoint import checkpoint_at
from loadtest.bench.figures import STREAM, Measurement
from loadtest.bench.workload import Workload
from loadtest.results import machine, write_json

WARM_UP_USERS, WARM_UP_SERIES = 4, 0
EXTRA_REQUESTS = 6  # per user at most, before the window opens and after it closes


def main() -> None:
    args = arguments()
    with script.one_line_failures(), checkpoint_at(args.checkpoint) as args.checkpoint:
        run(args)


def run(args: argparse.Namespace) -> None:
    """Runs all rounds, and writes the results after each."""
    named = ("servers", "concurrency", "rounds", "seconds", "seed")
    about = {"machine": machine(), "settings": {name: getattr(args, name) for name in named}}
    workload = Workload(args.seed)
    measurements: list[Measurement] = []
    for number in range(args.rounds):
        turn = number % len(args.servers)
        for entry in args.servers[turn:] + args.servers[:turn]:
            for measurement in one_server(entry, number, workload, args):
                measurements.append(measurement)
                found = measurement.figures
                print(
                    f"round {number + 1}, {entry}, {measurement.concurrency} users: "
                    f"{found['requests_per_s']:.2f} req/s, {found['tokens_per_s']:.0f} tokens/s",
                    flush=True,
                )
        write(about, measurements, args.output)
    medians, ratios = figures.medians(measurements), figures.ratios(measurements)
    figures.plot(medians, ratios, title(about), args.output / "plot.png")
    print(f"\n{figures.table(medians, ratios)}\n\n{args.output}/results.json, plot.png")
    if workload.made_late:
        print(f"{workload.made_late} pictures were drawn while measuring: raise --most-per-second")


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
            endpoint = stack.enter_context(
                servers.running(name, args.checkpoint, log, patient=True)
            )

        def measure(users: int, seconds: float, *series: int) -> client.Window:
            expected = int(args.most_per_second * seconds) + EXTRA_REQUESTS * users
            workload.prepare(expected)
            requests = workload.requests(*series)
            return asyncio.run(
                client.measure(endpoint, requests, users=users, seconds=seconds, stream=stream)
            )

        measure(WARM_UP_USERS, 0, WARM_UP_SERIES)
        for users in args.concurrency:
            with servers.PeakMemory(endpoint.process) as memory:
                window = measure(users, args.seconds, number, users)  # equal for all servers
            found = figures.figures(window, memory.peak)
            yield Measurement(entry, number, users, len(window.ended_inside()), found)


def write(about: dict[str, Any], measurements: list[Measurement], output: Path) -> None:
    results = {
        **about,
        "ratios": [asdict(ratio) for ratio in figures.ratios(measurements)],
        "medians": [
            {"entry": entry, "concurrency": users, **found}
            for (entry, users), found in figures.medians(measurements).items()
        ],
        "measurements": [asdict(m) for m in measurements],
    }
    write_json(output / "results.json", results)


def title(about: dict[str, Any]) -> str:
    machine, settings = about["machine"], about["settings"]
    return (
        f"{machine['cores']} cores of {machine['cpu']}\n"
        f"medians of {settings['rounds']} x {settings['seconds']:g} s, and times the monolith"
    )


def arguments() -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument(
        "--servers",
        nargs="*",
        default=["blip2-serve", servers.MONOLITH],
        help=f"{', '.join(servers.NAMES)} or names of --url; append ':stream' to stream",
    )
    parser.add_argument(
        "--url", nargs="*", default=[], help="NAME=http://host:port of a running server"
    )
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32], help="users")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20, help="length of each window")
    parser.add_argument("--seed", type=int, default=0, help="of questions and pictures")
    parser.add_argument(
        "--most-per-second",
        type=float,
        default=20,
        help="requests per second to draw pictures for in advance",
    )
    parser.add_argument("--checkpoint", type=Path, help="folder; written if missing")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder")
    args = parser.parse_args()

    if not all("=" in url for url in args.url):
        parser.error("--url takes NAME=URL")
    args.url = dict(url.split("=", 1) for url in args.url)
    named = {entry.removesuffix(STREAM) for entry in args.servers}
    args.servers += [name for name in args.url if name not in named]
    for entry in args.servers:
        if entry.removesuffix(STREAM) not in {*servers.NAMES, *args.url}:
            parser.error(f"unknown server {entry!r}")
    if f"{servers.MONOLITH}{STREAM}" in args.servers:
        parser.error("the monolith cannot stream")
    return args


if __name__ == "__main__":
    main()
