"""Memory of the server's processes while thousands of requests of every kind come and go.

    python loadtest/bench/memory.py [--requests 10000] [--every 1000] [--users 16]

Starts the shipped checkpoint by `blip2-serve up`. Users ask, each as soon as the last request is
answered: captions, questions and later turns of chats, about new and known pictures, of several
lengths, greedy, sampled and with beams, whole and streamed; some leave before they are answered.
Prints the megabytes of each process that no other shares (USS), after every thousand requests with
nobody asking. Exits with 1 if the replicas, or all processes together, have over 5% more at the end
than after the first thousand, by when the server's caches are full.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import client, script, servers
from bench.servers import Endpoint, ProcessMemory
from bench.workload import Request, lengths, picture, question
from blip2_serve.model.source import DEMO_FOLDER

SEED = 0
MOST_GROWTH = 0.05
SETTLE_S = 2.0  # for what is done after an answer

PHOTOGRAPHS = 32  # of different sizes in bytes
REMEMBERED, RETURNING = 64, 1 / 3  # latest requests; share of those that go on from one of them
MOST_EARLIER = 3  # turns of a chat
STREAMED, LEAVING, LEAVES_WITHIN_S = 0.3, 0.15, 0.3
WAYS: list[dict[str, Any]] = [
    *(6 * [{}]),
    {"temperature": 1},
    {"temperature": 1, "n": 3},
    {"num_beams": 4},
    {"num_beams": 3, "n": 2},
]

Samples = dict[int, list[ProcessMemory]]  # by requests so far
Chosen = Callable[[ProcessMemory], bool]


@dataclass(frozen=True)
class Visit:
    request: Request
    stream: bool
    leaves_after_s: float | None  # None: stays to the end


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=1_000)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--log", type=Path, default=Path("results/memory.log"), help="the server's")
    args = parser.parse_args()
    with script.failures_told():
        samples = measure(args.requests, args.every, args.users, args.log)
        print(f"\n{table(samples)}")
        for name, chosen in GROUPS.items():
            if growth(samples, chosen) > MOST_GROWTH:
                raise script.Missed(f"{name}: more than {MOST_GROWTH:.0%} more than at first")


def measure(requests: int, every: int, users: int, log: Path) -> Samples:
    samples: Samples = {}
    coming = visits(SEED)
    with servers.running("blip2-serve", DEMO_FOLDER, log) as endpoint:
        assert endpoint.process is not None
        for asked in range(every, requests + 1, every):
            start = time.perf_counter()
            asyncio.run(drive(endpoint, islice(coming, every), users))
            seconds = time.perf_counter() - start
            time.sleep(SETTLE_S)
            samples[asked] = servers.memory(endpoint.process)
            megabytes = ", ".join(f"{n} {total(samples[asked], c):.1f}" for n, c in GROUPS.items())
            print(f"{asked} requests, {every / seconds:.0f} per second: {megabytes} MB", flush=True)
    return samples


async def drive(endpoint: Endpoint, coming: Iterator[Visit], users: int) -> None:
    """All of these visits, so many at once.

    Raises:
        WrongAnswer: the first one.
    """

    async def user() -> None:
        for visit in coming:
            with suppress(TimeoutError):
                async with asyncio.timeout(visit.leaves_after_s):
                    # Once past its end, the small model may go on with nothing but line breaks.
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
            if len(last.earlier) < MOST_EARLIER and rng.random() < 0.5:
                earlier = (*last.earlier, (last.question, question(rng, 6)))
        else:
            # Decoders stop at a JPEG's end: what follows makes it another file for nothing.
            data = rng.choice(photographs) + number.to_bytes(8)
            shown = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
        request = Request(asked, shown, max_tokens, earlier, rng.choice(WAYS))
        latest.append(request)
        leaves = rng.uniform(0, LEAVES_WITHIN_S) if rng.random() < LEAVING else None
        yield Visit(request, rng.random() < STREAMED, leaves)


# -- what was found --------------------------------------------------------------------------------

GROUPS: dict[str, Chosen] = {
    "replicas": lambda process: process.is_replica,
    "Ray and the command": lambda process: not process.is_replica,
    "together": lambda _: True,
}


def total(sample: list[ProcessMemory], chosen: Chosen) -> float:
    """Megabytes."""
    return sum(process.bytes for process in sample if chosen(process)) / 1e6


def growth(samples: Samples, chosen: Chosen) -> float:
    """From the first sample to the last, as a share of the first."""
    sums = [total(sample, chosen) for sample in samples.values()]
    return sums[-1] / sums[0] - 1


def table(samples: Samples) -> str:
    """Markdown: megabytes of each process and each group, after so many requests."""
    rows = [
        f"| process | {' | '.join(f'{asked:,}' for asked in samples)} | growth |",
        f"|---|{'---:|' * (len(samples) + 1)}",
    ]

    def add(name: str, chosen: Chosen) -> None:
        cells = [f"{total(sample, chosen):.1f}" for sample in samples.values()]
        there_first = total(next(iter(samples.values())), chosen) > 0
        grown = f"{growth(samples, chosen):+.1%}" if there_first else "new"
        rows.append(f"| {name} | {' | '.join(cells)} | {grown} |")

    seen = {process.pid: process for sample in samples.values() for process in sample}
    for pid, process in sorted(seen.items(), key=lambda item: (not item[1].is_replica, item[0])):
        add(f"{process.name} ({pid})", _is(pid))
    for name, chosen in GROUPS.items():
        add(name, chosen)
    return "\n".join(rows)


def _is(pid: int) -> Chosen:
    return lambda process: process.pid == pid


if __name__ == "__main__":
    main()
