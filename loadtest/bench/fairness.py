"""Measures what a flood by one tenant costs the others.

    python -m loadtest.bench.fairness --seconds 60 --rounds 3 --output results/fairness

Starts a server with an API key for each of several tenants. First the plateau, as in `overload`.
Then, in turn, open loops in which every tenant sends its share of `--load` times the plateau, and
in which one of them sends `--flood` times its share. For both: the latencies of the others'
requests from when they should have been sent, how many of them were refused, and what each tenant
got. Last, all tenants flood: what each gets.

Each request is about a new small JPEG. Prints a table and writes fairness.json.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from blip2_serve.client import KEY_VARIABLE
from blip2_serve.http.keys import add_key
from loadtest.bench import loops, script, servers
from loadtest.bench.checkpoint import checkpoint_at
from loadtest.bench.connections import Connections
from loadtest.bench.loops import Clients, Messages, Outcome
from loadtest.bench.overload import allow_many_files, highest_plateau
from loadtest.bench.overload_figures import Latencies
from loadtest.results import machine, markdown_table, write_json

LOUD = "loud"


@dataclass(frozen=True)
class Shares:
    """One load by all tenants."""

    load: str
    quiet: Latencies  # of those tenants that do not flood
    quiet_refused: int
    quiet_failed: int
    answered_per_s: Mapping[str, float]  # by tenant


def main() -> None:
    args = arguments()
    with script.one_line_failures(), checkpoint_at(args.checkpoint) as checkpoint:
        args.output.mkdir(parents=True, exist_ok=True)
        names = [LOUD, *(f"quiet-{number}" for number in range(1, args.tenants))]
        file = args.output / "keys.yaml"
        file.unlink(missing_ok=True)
        keys = {name: add_key(file, name) for name in names}
        os.environ[KEY_VARIABLE] = keys[LOUD]
        port = servers.free_port()
        command = [*servers.command("blip2-serve", checkpoint, port), "--api-keys", str(file)]
        with servers.started(command, port, args.output / "server.log") as endpoint:
            asyncio.run(run(endpoint, keys, args))


async def run(
    endpoint: servers.Endpoint, keys: Mapping[str, str], args: argparse.Namespace
) -> None:
    """Runs all loads, prints them, and writes the results."""
    allow_many_files()
    gc.freeze()
    connections = Connections(endpoint.url, args.timeout)
    tenants = {
        name: Clients(Messages(endpoint, seed, key), connections)
        for seed, (name, key) in enumerate(keys.items())
    }
    share = args.load / len(tenants)
    try:
        users, plateau = await highest_plateau(tenants[LOUD], args.users, args.seconds / 2)
        print(f"plateau: {plateau:.2f} req/s with {users} users", flush=True)
        found = []
        for number in range(args.rounds):
            for factor in (1.0, args.flood):
                factors = {name: factor if name == LOUD else 1.0 for name in tenants}
                rates = {name: factors[name] * share * plateau for name in tenants}
                load = f"one at {factor:g} x its share"
                found.append(await together(load, tenants, rates, args.seconds, number))
                print(row(found[-1]), flush=True)
        rates = dict.fromkeys(tenants, 2 * plateau)
        found.append(await together("all flood", tenants, rates, args.seconds, args.rounds))
    finally:
        connections.close()
    settings = {name: str(value) for name, value in vars(args).items()}
    results = {"machine": machine(), "settings": settings, "plateau": plateau}
    write_json(args.output / "fairness.json", {**results, "loads": [asdict(s) for s in found]})
    head = ["load", "others p50 / p99 s", "refused", "failed", "answered/s: loud, others"]
    print("\n" + markdown_table(head, [row(shares) for shares in found]))


async def together(
    load: str,
    tenants: Mapping[str, Clients],
    rates: Mapping[str, float],
    seconds: float,
    seed: int,
) -> Shares:
    """All tenants' open loops at once."""
    loads = []
    async with asyncio.TaskGroup() as group:
        for name, clients in tenants.items():
            arrivals = list(loops.poisson(rates[name], seconds, random.Random(f"{name} {seed}")))
            loads.append(group.create_task(loops.open_loop(clients, arrivals, seconds)))
    outcomes: dict[str, Sequence[Outcome]] = {}
    rate = {}
    for name, task in zip(tenants, loads, strict=True):
        began, asked = task.result()
        outcomes[name] = await asyncio.gather(*asked)
        done = sum(o.is_answered and o.ended <= began + seconds for o in outcomes[name])
        rate[name] = done / seconds
    quiet = [outcome for name in tenants if name != LOUD for outcome in outcomes[name]]
    return Shares(
        load,
        Latencies.of([o for o in quiet if o.is_answered]),
        sum(o.is_refused for o in quiet),
        sum(bool(o.failure) for o in quiet),
        rate,
    )


def row(shares: Shares) -> list[str]:
    loud, *others = shares.answered_per_s.values()
    return [
        shares.load,
        f"{shares.quiet.p50_s or 0:.2f} / {shares.quiet.p99_s or 0:.2f}",
        str(shares.quiet_refused),
        str(shares.quiet_failed),
        f"{loud:.2f}, " + " ".join(f"{other:.2f}" for other in others),
    ]


def arguments() -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, help="folder; written if missing")
    parser.add_argument("--tenants", type=int, default=4, help="number")
    parser.add_argument("--load", type=float, default=0.8, help="of all, times the plateau")
    parser.add_argument("--flood", type=float, default=50, help="times the share of one tenant")
    parser.add_argument("--rounds", type=int, default=3, help="number")
    parser.add_argument("--seconds", type=float, default=60, help="of each load")
    parser.add_argument("--users", type=int, nargs="+", default=[32], help="of the plateau")
    parser.add_argument("--timeout", type=float, default=60, help="seconds, of each request")
    parser.add_argument("--output", type=Path, default=Path("results/fairness"), help="folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
