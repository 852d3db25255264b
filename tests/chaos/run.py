"""Breaks a server under load, again and again, and checks that nothing is lost.

    python -m tests.chaos.run --faults 20 --seed 1

Starts `blip2-serve up` with the shipped checkpoint in float32 and two replicas of each stage, notes
the undisturbed answers, and injects faults under load. The next fault comes when every stage is
whole again. Prints the checker's report; exits with 1 on any violation.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `support`, outside pytest

from support.up import Up, running_up
from tests.chaos import checker, history
from tests.chaos.faults import CONTROLLER, STAGES, Injector, Processes, is_stopped
from tests.chaos.load import TIMEOUT_S, Load, templates, undisturbed

REPLICAS = 2
TEMPLATES_OF_EACH_KIND = 2
BUSY = 4  # requests in flight
WHOLE_WITHIN_S, SETTLE_S, POLL_S = 180.0, 3.0, 0.2
LOADED = re.compile(r"ServeReplica:blip2:\w+ pid=(\d+)\).* loaded ")

# The stages that report in the log when they have loaded.
LOADING = ("Encoder", "Generator")
FAULTS = ("kill", "pause", "kill_while_loading", "kill_two", "freeze", "ingress", "controller")


def plan(
    count: int, rng: random.Random, kinds: tuple[str, ...] = FAULTS
) -> Iterator[tuple[str, str]]:
    """Kinds of faults with their stages: all pairs in random order, and then again."""
    pairs = [
        (kind, stage)
        for kind in kinds
        for stage in {"ingress": ("Ingress",), "controller": (CONTROLLER,)}.get(kind, STAGES)
    ]
    endless = (pair for _ in itertools.count() for pair in rng.sample(pairs, len(pairs)))
    return itertools.islice(endless, count)


def inject(injector: Injector, kind: str, stage: str) -> None:
    how: Callable[[str], None] = getattr(injector, kind, injector.kill)
    how(stage)


def configuration(folder: Path) -> Path:
    """Two replicas of each stage and one ingress, which reserve no cores."""
    stages = {stage.lower(): {"num_replicas": REPLICAS, "num_cpus": 0} for stage in STAGES}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({**stages, "ingress": {"num_cpus": 0}, "dtype": "float32"}))
    return file


def is_whole(up: Up, processes: Processes) -> bool:
    """Whether every stage has all its replicas, and those that load have loaded."""
    loaded = {int(pid) for pid in LOADED.findall(up.log.read_text())}
    wanted = {**dict.fromkeys(STAGES, REPLICAS), "Ingress": 1, CONTROLLER: 1}
    for stage, count in wanted.items():
        pids = {process.pid for process in processes.of(stage) if not is_stopped(process)}
        if len(pids) != count or (stage in LOADING and not pids <= loaded):
            return False
    return True


async def until_whole(up: Up, processes: Processes, session: aiohttp.ClientSession) -> bool:
    """Waits until all stages are whole and the server is ready; False if that takes too long."""
    deadline = time.monotonic() + WHOLE_WITHIN_S
    while time.monotonic() < deadline:
        if await asyncio.to_thread(is_whole, up, processes):
            try:
                async with session.get(f"{up.url}/ready") as response:
                    if response.status == 200:
                        await asyncio.sleep(SETTLE_S)  # until the ingress knows the replicas
                        return True
            except aiohttp.ClientError:
                pass  # the ingress is new
        await asyncio.sleep(POLL_S)
    return False


async def run(up: Up, args: argparse.Namespace, file: Path) -> bool:
    """Runs load and faults into a history. Returns whether the server was whole after each."""
    rng = random.Random(args.seed)
    writer = history.Writer(file)
    processes = Processes(up.process.pid)
    injector = Injector(processes, writer.add, rng)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        assert await until_whole(up, processes, session), "some replicas never started"
        some = templates(TEMPLATES_OF_EACH_KIND, args.seed)
        expected = await undisturbed(session, up.url, some)
        print(f"{len(some)} undisturbed answers", flush=True)
        load = Load(up.url, list(zip(some, expected, strict=True)), writer, args.rate, args.seed)
        enough = asyncio.Event()
        loading = asyncio.create_task(load.run(session, enough))
        whole = True
        for number, (kind, stage) in enumerate(plan(args.faults, rng, tuple(args.kinds)), 1):
            await asyncio.sleep(rng.uniform(1, 3))
            while load.in_flight < BUSY:  # a fault that meets no work proves nothing
                await asyncio.sleep(0.01)
            print(f"fault {number}: {kind} {stage}, {load.in_flight} in flight", flush=True)
            await asyncio.to_thread(inject, injector, kind, stage)
            whole = await until_whole(up, processes, session)
            if not whole:
                print(f"NOT WHOLE within {WHOLE_WITHIN_S:g} s after {kind} {stage}", flush=True)
                break
        enough.set()
        await loading
    writer.close()
    return whole


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops the server like Ctrl-C
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "history.jsonl"
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(Path(folder))
        with running_up(Path(folder), "--config", config) as up:
            whole = asyncio.run(run(up, args, file))
    report = checker.check(history.read(file))
    print(f"\n{report}\n{file}")
    sys.exit(bool(report.violations) or not whole)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=20, help="number")
    parser.add_argument("--kinds", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--seed", type=int, default=1, help="of faults and load")
    parser.add_argument("--rate", type=float, default=6, help="requests per second")
    parser.add_argument("--output", type=Path, default=Path("results/chaos"), help="folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
