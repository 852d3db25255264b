"""Watches the memory of the server's processes over thousands of requests of every kind.

    python -m loadtest.bench.memory [--requests 10000] [--every 1000] [--users 16]

Starts the shipped checkpoint with `blip2-serve up`. Users ask again as soon as they are answered:
captions, questions and later turns of chats, about new and known pictures, of several lengths,
greedy, sampled and with beams, whole and streamed; some disconnect early. Prints the unshared
megabytes (USS) of each process after every --every requests, when the server is idle.

The caches are full after the first 1,000 requests. Exits with 1 if the replicas, Ray's processes or
all of them together then grow by more than 5%.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from blip2_serve.model.source import DEMO_FOLDER
from loadtest.bench import client, script, servers
from loadtest.bench.servers import Endpoint, ProcessMemory
from loadtest.bench.workload import Request, data_url, lengths, picture, question
from loadtest.results import markdown_table

SEED = 0
MAX_GROWTH = 0.05
SETTLE_S = 2.0  # for what the server does after an answer

PHOTOGRAPHS = 32
REMEMBERED, RETURNING = 64, 1 / 3  # latest requests; the share of requests that follow one of them
MAX_EARLIER = 3  # turns of a chat
STREAMED, LEAVING, LEAVES_WITHIN_S = 0.3, 0.15, 0.3
WAYS: list[dict[str, Any]] = [
    *(6 * [{}]),
    {"temperature": 1},
    {"temperature": 1, "n": 3},
    {"num_beams": 4},
    {"num_beams": 3, "n": 2},
]

Samples = dict[int, list[ProcessMemory]]  # by number of requests so far
Chosen = Callable[[ProcessMemory], bool]

GROUPS: dict[str, Chosen] = {
    "replicas": lambda process: process.is_replica,
    "Ray and the command": lambda process: not process.is_replica,
    "together": lambda _: True,
}


@dataclass(frozen=True)
class Visit:
    request: Request
    stream: bool
    leaves_after_s: float | None  # None: stays to the end


def main() -> None:
    parser = script.parser(__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=1_000, help="requests between samples")
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--log", type=Path, default=Path("results/memory.log"), help="server log")
    args = parser.parse_args()
    with script.one_line_failures():
        samples = measure(args.requests, args.every, args.users, args.log)
        print(f"\n{table(samples)}")
        for name, chosen in GROUPS.items():
            if growth(samples, chosen) > MAX_GROWTH:
                raise script.Missed(f"{name}: more than {MAX_GROWTH:.0%} growth")


def measure(requests: int, every: int, users: int, log: Path) -> Samples:
    samples: Samples = {}
    coming = visits(SEED)
    with servers.running("blip2-serve", DEMO_FOLDER, log) as endpoint:
        assert endpoint.process is not None
        for done in range(every, requests + 1, every):
            start = time.perf_counter()
            asyncio.run(drive(endpoint, islice(coming, every), users))
            seconds = time.perf_counter() - start
            time.sleep(SETTLE_S)
            samples[done] = servers.memory(endpoint.process)
            megabytes = ", ".join(f"{n} {total(samples[done], c):.1f}" for n, c in GROUPS.items())
            print(f"{done} requests, {every / seconds:.0f} per second: {megabytes} MB", flush=True)
    return samples


async def drive(endpoint: Endpoint, coming: Iterator[Visit], users: int) -> None:
    """Makes all visits with `users` at once.

    Raises:
        WrongAnswer: the first one ends them.
    """

    async def user() -> None:
        for visit in coming:
            with suppress(TimeoutError):
                async with asyncio.timeout(visit.leaves_after_s):
                    # Beyond the end of its answer, the small model may write nothing but newlines.
                    await client.ask(
                        session, endpoint, visit.request, stream=visit.stream, silent=True
                    )

    async with client.new_session() as session:
        await client.together(user() for _ in range(users))


def visits(seed: int) -> Iterator[Visit]:
    """Endless; equal seeds give equal visits."""
    rng = random.Random(seed)
    photographs = [picture(np.random.default_rng((seed, i))) for i in range(PHOTOGRAPHS)]
    latest: deque[Request] = deque(maxlen=REMEMBERED)
    for number, max_tokens in enumerate(lengths(rng)):
        asked = question(rng, rng.randint(4, 12)) if rng.random() < 0.8 else ""
        earlier: tuple[tuple[str, str], ...] = ()
        if latest and rng.random() < RETURNING:
            last = rng.choice(latest)
            shown = last.picture
            if len(last.earlier) < MAX_EARLIER and rng.random() < 0.5:
                earlier = (*last.earlier, (last.question, question(rng, 6)))
        else:
            # Decoders ignore bytes after a JPEG's end, so this is a new file without a new drawing.
            shown = data_url(rng.choice(photographs) + number.to_bytes(8))
        request = Request(asked, shown, max_tokens, earlier, rng.choice(WAYS))
        latest.append(request)
        leaves = rng.uniform(0, LEAVES_WITHIN_S) if rng.random() < LEAVING else None
        yield Visit(request, rng.random() < STREAMED, leaves)


def total(sample: list[ProcessMemory], chosen: Chosen) -> float:
    """Megabytes of the chosen processes."""
    return sum(process.bytes for process in sample if chosen(process)) / 1e6


def growth(samples: Samples, chosen: Chosen) -> float:
    """Growth from the first sample to the last, as a share of the first."""
    sums = [total(sample, chosen) for sample in samples.values()]
    return sums[-1] / sums[0] - 1


def table(samples: Samples) -> str:
    """Markdown with the megabytes of each process and each group after so many requests."""

    def row(name: str, chosen: Chosen) -> list[str]:
        sums = [total(sample, chosen) for sample in samples.values()]
        grown = f"{growth(samples, chosen):+.1%}" if sums[0] else "new"
        return [name, *(f"{megabytes:.1f}" for megabytes in sums), grown]

    def only(pid: int) -> Chosen:
        return lambda process: process.pid == pid

    seen = {process.pid: process for sample in samples.values() for process in sample}
    processes = sorted(seen.values(), key=lambda process: (not process.is_replica, process.pid))
    rows = [row(f"{p.name} ({p.pid})", only(p.pid)) for p in processes]
    rows += [row(name, chosen) for name, chosen in GROUPS.items()]
    return markdown_table(["process", *(f"{done:,}" for done in samples), "growth"], rows)


if __name__ == "__main__":
    main()
