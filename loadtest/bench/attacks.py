"""Measures what clients that misuse HTTP cost the others.

    python -m loadtest.bench.attacks --seconds 30 --rounds 3 --output results/attacks

Starts a server. First the plateau, as in `overload`. Then open loops at `--load` times the plateau,
in turn alone and beside each attack, which comes from a process of its own:

- silent: `--connections` connections on which nothing is sent.
- slow heads, slow bodies: as many, each with a byte per second.
- large heads: `--rate` requests per second with 500 headers, 60 KB in all.
- early closes: as many requests, of which each client leaves after sending half the body.

An attacker whose connection is closed opens another. Prints a table and writes attacks.json.
Attackers, users and server share the machine's cores, but attackers give way to the others.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import multiprocessing
import os
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from urllib.parse import urlsplit

from loadtest.bench import loops, script, servers
from loadtest.bench.checkpoint import checkpoint_at
from loadtest.bench.connections import Connections
from loadtest.bench.loops import Clients, Messages
from loadtest.bench.overload import allow_many_files, highest_plateau
from loadtest.bench.overload_figures import Latencies
from loadtest.results import machine, markdown_table, write_json

ALONE = "alone"
DRIP_S, RETRY_S = 1.0, 1.0
SETTLED_S = 2.0  # from the attackers' start to the users' first request
STARTED_WITHIN_S = 60
NICENESS = 19
LARGE_HEAD = b"".join(b"x-header-%d: %s\r\n" % (number, b"a" * 105) for number in range(500))


@dataclass(frozen=True)
class Load:
    attack: str
    users: Latencies
    refused: int
    failed: int


# -- attacks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    host: str
    port: int
    request: bytes  # that the server would answer

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host, self.port)


async def drip(target: Target, begin: bytes, drop: bytes) -> None:
    """Holds a connection: sends `begin`, then `drop` again and again, until the server closes."""
    reader, writer = await target.connect()
    closed = asyncio.create_task(reader.read())
    try:
        writer.write(begin)
        while not closed.done():
            await asyncio.wait([closed], timeout=DRIP_S)
            writer.write(drop)
    finally:
        closed.cancel()
        writer.transport.abort()


async def large_head(target: Target) -> None:
    """Sends one request with very many headers, and reads the answer."""
    reader, writer = await target.connect()
    try:
        head, _, body = target.request.partition(b"\r\n\r\n")
        writer.write(head + b"\r\n" + LARGE_HEAD + b"connection: close\r\n\r\n" + body)
        await reader.read()
    finally:
        writer.transport.abort()


async def early_close(target: Target) -> None:
    """Leaves when half of the request is sent."""
    _, writer = await target.connect()
    writer.write(target.request[: len(target.request) // 2])
    await writer.drain()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


Client = Callable[[Target], Awaitable[None]]
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
HELD: dict[str, Client] = {
    "silent": partial(drip, begin=b"", drop=b""),
    "slow heads": partial(drip, begin=HEAD + b"x-slow: ", drop=b"a"),
    "slow bodies": partial(drip, begin=HEAD + b"content-length: 100000\r\n\r\n{", drop=b" "),
}
REPEATED: dict[str, Client] = {"large heads": large_head, "early closes": early_close}


def attack(name: str, target: Target, connections: int, rate: float, begun: Event) -> None:
    """Attacks until the process is killed."""
    allow_many_files()
    os.nice(NICENESS)

    async def hold() -> None:
        while True:
            with contextlib.suppress(OSError):
                await HELD[name](target)
            await asyncio.sleep(RETRY_S)

    async def once() -> None:
        with contextlib.suppress(OSError):
            await REPEATED[name](target)

    async def run() -> None:
        begun.set()
        async with asyncio.TaskGroup() as group:
            if name in HELD:
                for _ in range(connections):
                    group.create_task(hold())
            while name in REPEATED:
                group.create_task(once())
                await asyncio.sleep(1 / rate)

    asyncio.run(run())


@contextmanager
def attacked(name: str, target: Target, args: argparse.Namespace) -> Iterator[None]:
    if name == ALONE:
        yield
        return
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    process = context.Process(
        target=attack, args=(name, target, args.connections, args.rate, begun), daemon=True
    )
    process.start()
    try:
        if not begun.wait(STARTED_WITHIN_S):
            raise script.Missed("the attackers did not start")
        yield
        if not process.is_alive():
            raise script.Missed(f"the attackers ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


# -- the others ------------------------------------------------------------------------------------


def main() -> None:
    args = arguments()
    with script.one_line_failures(), checkpoint_at(args.checkpoint) as checkpoint:
        args.output.mkdir(parents=True, exist_ok=True)
        port = servers.free_port()
        command = servers.command("blip2-serve", checkpoint, port)
        with servers.started(command, port, args.output / "server.log") as endpoint:
            asyncio.run(run(endpoint, args))


async def run(endpoint: servers.Endpoint, args: argparse.Namespace) -> None:
    """Runs all loads, prints them, and writes the results."""
    allow_many_files()
    gc.freeze()
    connections = Connections(endpoint.url, args.timeout)
    clients = Clients(Messages(endpoint, 0), connections)
    parts = urlsplit(endpoint.url)
    request = Messages(endpoint, 1).message(0)
    target = Target(parts.hostname or "127.0.0.1", parts.port or 80, request)
    loads = []
    try:
        users, plateau = await highest_plateau(clients, args.users, args.seconds / 2)
        print(f"plateau: {plateau:.2f} req/s with {users} users", flush=True)
        for number in range(args.rounds):
            for name in (ALONE, *HELD, *REPEATED):
                with attacked(name, target, args):
                    await asyncio.sleep(SETTLED_S)
                    loads.append(await beside(name, clients, args.load * plateau, args, number))
                print(row(loads[-1]), flush=True)
    finally:
        connections.close()
    settings = {name: str(value) for name, value in vars(args).items()}
    results = {"machine": machine(), "settings": settings, "plateau": plateau}
    write_json(args.output / "attacks.json", {**results, "loads": [asdict(x) for x in loads]})
    head = ["attack", "others p50 / p99 s", "refused", "failed"]
    print("\n" + markdown_table(head, [row(load) for load in loads]))


async def beside(
    name: str, clients: Clients, rate: float, args: argparse.Namespace, seed: int
) -> Load:
    arrivals = list(loops.poisson(rate, args.seconds, random.Random(seed)))
    _, asked = await loops.open_loop(clients, arrivals, args.seconds)
    outcomes = await asyncio.gather(*asked)
    return Load(
        name,
        Latencies.of([o for o in outcomes if o.is_answered]),
        sum(o.is_refused for o in outcomes),
        sum(bool(o.failure) for o in outcomes),
    )


def row(load: Load) -> list[str]:
    latencies = f"{load.users.p50_s or 0:.2f} / {load.users.p99_s or 0:.2f}"
    return [load.attack, latencies, str(load.refused), str(load.failed)]


def arguments() -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, help="folder; written if missing")
    parser.add_argument("--connections", type=int, default=1000, help="held by attackers")
    parser.add_argument("--rate", type=float, default=50, help="requests per second of attackers")
    parser.add_argument("--load", type=float, default=0.5, help="of the users, times the plateau")
    parser.add_argument("--rounds", type=int, default=3, help="number")
    parser.add_argument("--seconds", type=float, default=30, help="of each load")
    parser.add_argument("--users", type=int, nargs="+", default=[32], help="of the plateau")
    parser.add_argument("--timeout", type=float, default=60, help="seconds, of each request")
    parser.add_argument("--output", type=Path, default=Path("results/attacks"), help="folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
