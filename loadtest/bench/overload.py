"""Measures a server under several times the load that it can take.

    python -m loadtest.bench.overload --seconds 120 --factors 5 10 --output results/overload
    python -m loadtest.bench.overload --url http://127.0.0.1:8000

1. The plateau: the most captions per second that 32 or 64 waiting users get, and the p99 latency of
   an open loop at 80% of it ("at capacity").
2. Open loops at each factor times the plateau. Arrivals are Poisson with a fixed seed, every one is
   sent, and latencies count from when it should have been. What is answered with 200 (goodput),
   refused (429 or 503) or failed otherwise; then the time until a probe is answered as fast as 99%
   were at capacity.
3. A crowd three times the requests that the server held under overload, whose users come back when
   Retry-After says so: the share of refused requests that are admitted at their first retry.

Each request is about a new small JPEG. Without --url, a server is started as in `compare`. Prints a
table, says if requests were sent late, and writes overload.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import random
import resource
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from loadtest.bench import loops, overload_figures, script, servers
from loadtest.bench.checkpoint import checkpoint_at
from loadtest.bench.connections import Connections
from loadtest.bench.loops import Clients, Messages
from loadtest.bench.overload_figures import Obedience, OpenLoad
from loadtest.bench.servers import Endpoint
from loadtest.results import machine, write_json

AT_CAPACITY = 0.8
LEAD_SHARE = 0.2  # of a closed loop's window, before it opens
CROWD = 3  # times the requests that the server held under overload, for the obedient
FEW_ANSWERS = 20  # at capacity: fewer have no p99


def main() -> None:
    args = arguments()
    with script.one_line_failures(), endpoint(args) as found:
        asyncio.run(run(found, args))


@contextlib.contextmanager
def endpoint(args: argparse.Namespace) -> Iterator[Endpoint]:
    """The server of --url, or one that is started."""
    if args.url:
        yield servers.connect(args.url)
        return
    log = args.output / "server.log"
    with (
        checkpoint_at(args.checkpoint) as checkpoint,
        servers.running("blip2-serve", checkpoint, log) as started,
    ):
        yield started


async def run(endpoint: Endpoint, args: argparse.Namespace) -> None:
    """Runs all parts, prints them, and writes the results.

    Raises:
        Missed: too few requests were answered at capacity to judge an overload by.
    """
    allow_many_files()
    gc.freeze()  # a collection of all that torch has made stops the sender for half a second
    connections = Connections(endpoint.url, args.timeout)
    clients = Clients(Messages(endpoint, args.seed), connections)
    try:
        users, plateau = await highest_plateau(clients, args.users, args.calibration_seconds)
        print(f"plateau: {plateau:.2f} req/s with {users} users", flush=True)
        calm = await load(clients, AT_CAPACITY, plateau, args.calibration_seconds, args.seed)
        limit = calm.accepted.p99_s
        if limit is None or calm.accepted.count < FEW_ANSWERS:
            raise script.Missed(
                f"{calm.accepted.count} requests were answered at {AT_CAPACITY:.0%} of the "
                f"plateau, too few for a p99; failed: {overload_figures.counts(calm.failures)}"
            )
        loads = [calm]
        for factor in args.factors:
            loads += [
                await load(clients, factor, plateau, args.seconds, args.seed, limit, args.recovery)
            ]
            write(args, users, plateau, loads, None)  # the next one may break the server
        obeying = await obey(clients, crowd(loads[-1]), args.obeying)
    finally:
        connections.close()
    write(args, users, plateau, loads, obeying)
    print(f"\n{overload_figures.table(loads)}\n")
    print(overload_figures.lateness(loads))
    print(f"{overload_figures.admitted(obeying)}\n\n{args.output}/overload.json")


def write(
    args: argparse.Namespace,
    users: int,
    plateau: float,
    loads: Sequence[OpenLoad],
    obeying: Obedience | None,
) -> None:
    named = ("seconds", "calibration_seconds", "obeying", "factors", "seed", "timeout")
    results = {
        "machine": machine(),
        "settings": {name: getattr(args, name) for name in named},
        "plateau": {"users": users, "requests_per_s": plateau},
        "loads": [asdict(load) for load in loads],
    }
    if obeying is not None:
        share = obeying.admitted_share
        results["obedience"] = {**asdict(obeying), "admitted_share": share}
    write_json(args.output / "overload.json", results)


async def highest_plateau(
    clients: Clients, numbers: Iterable[int], seconds: float
) -> tuple[int, float]:
    """The number of users with most answers per second, and those."""
    found = []
    for users in numbers:
        opened, outcomes = await loops.closed_loop(clients, users, LEAD_SHARE * seconds, seconds)
        rate = overload_figures.answered_per_s(outcomes, opened, seconds)
        if not rate:
            failed = overload_figures.counts(overload_figures.failures(outcomes))
            raise script.Missed(f"nothing was answered to {users} users; failed: {failed}")
        found.append((rate, users))
    rate, users = max(found)
    return users, rate


async def load(
    clients: Clients,
    factor: float,
    plateau: float,
    seconds: float,
    seed: int,
    fast_s: float | None = None,
    recovery_s: float = 0,
) -> OpenLoad:
    """One open loop, and with `fast_s` also the recovery from it."""
    arrivals = list(loops.poisson(factor * plateau, seconds, random.Random(f"{seed} {factor}")))
    cpu = time.process_time()
    began, asked = await loops.open_loop(clients, arrivals, seconds)
    client_cpu = (time.process_time() - cpu) / seconds
    recovered = None
    if fast_s is not None:
        recovered = await loops.recovery(clients, fast_s, recovery_s)
    outcomes = await asyncio.gather(*asked)
    found = overload_figures.open_load(
        outcomes, began, seconds, plateau, factor, client_cpu, recovered
    )
    print(
        f"{factor:g} x plateau: {found.answered_per_s:.2f} of {found.offered_per_s:.1f} req/s "
        f"answered, {found.refused.count} refused, {sum(found.failures.values())} failed",
        flush=True,
    )
    return found


def crowd(overload: OpenLoad) -> int:
    """Three times what the server held, by Little's law."""
    held = overload.answered_per_s * (overload.accepted.p50_s or 0.0)
    return CROWD * max(1, round(held))


async def obey(clients: Clients, users: int, seconds: float) -> Obedience:
    opened, outcomes = await loops.closed_loop(clients, users, LEAD_SHARE * seconds, seconds)
    return overload_figures.obedience(outcomes, users, opened, seconds)


def allow_many_files() -> None:
    """Every request in flight has a connection of its own."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def arguments() -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--url", help="http://host:port of a running server")
    parser.add_argument("--checkpoint", type=Path, help="folder; written if missing")
    parser.add_argument("--seconds", type=float, default=120, help="of each overload")
    parser.add_argument("--factors", type=float, nargs="+", default=[5, 10], help="times plateau")
    parser.add_argument("--users", type=int, nargs="+", default=[32, 64], help="of the plateau")
    parser.add_argument(
        "--calibration-seconds", type=float, default=30, help="of plateau and capacity, each"
    )
    parser.add_argument(
        "--obeying", type=float, default=150, help="seconds; a client may be told to wait for 60"
    )
    parser.add_argument("--recovery", type=float, default=120, help="seconds to wait for it")
    parser.add_argument("--timeout", type=float, default=60, help="seconds, of each request")
    parser.add_argument("--seed", type=int, default=0, help="of pictures and arrivals")
    parser.add_argument("--output", type=Path, default=Path("results/overload"), help="folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
