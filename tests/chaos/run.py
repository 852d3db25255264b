"""Breaks a server under load, again and again, and checks that nothing is lost.

    python -m tests.chaos.run --faults 20 --seed 1

Starts `blip2-serve up` with the shipped checkpoint in float32 and two replicas of each stage, notes
the undisturbed answers, and injects faults under load. The next fault comes when every stage is
whole again. Prints the checker's report; exits with 1 on any violation. Ctrl-C ends it early, with
a report of the faults until then.
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
from tests.chaos.load import Load, new_session, templates, undisturbed

REPLICAS = 2
TEMPLATES_OF_EACH_KIND = 2
BUSY, BUSY_FOR_S = 6, 0.1  # requests in flight just before a fault: without any it proves nothing
WHOLE_WITHIN_S, SETTLE_S, POLL_S, READY_S = 180.0, 3.0, 0.2, 10.0
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


def missing(up: Up, processes: Processes) -> str:
    """Which stages lack a replica that runs and has loaded; empty if none does."""
    loaded = {int(pid) for pid in LOADED.findall(up.log.read_text())}
    lacking = []
    for stage, count in {**dict.fromkeys(STAGES, REPLICAS), "Ingress": 1, CONTROLLER: 1}.items():
        pids = {process.pid for process in processes.of(stage) if not is_stopped(process)}
        if stage in LOADING:
            pids &= loaded
        if len(pids) != count:
            lacking.append(f"{stage} has {len(pids)} of {count}")
    return ", ".join(lacking)


async def until_whole(up: Up, processes: Processes, session: aiohttp.ClientSession) -> str:
    """Waits until all stages are whole and the server is ready; says what is missing if not."""
    deadline = time.monotonic() + WHOLE_WITHIN_S
    lacking = ""
    while time.monotonic() < deadline:
        lacking = await asyncio.to_thread(missing, up, processes)
        lacking = lacking or await not_ready(up, session)
        if not lacking:
            await asyncio.sleep(SETTLE_S)  # until the ingress knows the replicas
            return ""
        await asyncio.sleep(POLL_S)
    return lacking


async def not_ready(up: Up, session: aiohttp.ClientSession) -> str:
    try:
        timeout = aiohttp.ClientTimeout(total=READY_S)
        async with session.get(f"{up.url}/ready", timeout=timeout) as response:
            return "" if response.status == 200 else f"/ready answers {response.status}"
    except (aiohttp.ClientError, TimeoutError) as error:  # the ingress is new
        return f"/ready: {error!r}"


async def run(up: Up, args: argparse.Namespace, file: Path) -> bool:
    """Runs load and faults into a history. Returns whether the server was whole after each."""
    rng = random.Random(args.seed)
    writer = history.Writer(file)
    processes = Processes(up.process.pid)
    injector = Injector(processes, writer.add, rng)
    async with new_session() as session:
        lacking = await until_whole(up, processes, session)
        assert not lacking, lacking
        some = templates(TEMPLATES_OF_EACH_KIND, args.seed)
        expected = await undisturbed(session, up.url, some)
        print(f"{len(some)} undisturbed answers", flush=True)
        load = Load(up.url, list(zip(some, expected, strict=True)), writer, args.rate, args.seed)
        async with load.running(session):
            for number, (kind, stage) in enumerate(plan(args.faults, rng, tuple(args.kinds)), 1):
                await asyncio.sleep(rng.uniform(1, 3))
                for _ in range(load.in_flight, BUSY):
                    load.send(session)
                await asyncio.sleep(rng.uniform(0, BUSY_FOR_S))  # they are at any stage
                print(f"fault {number}: {kind} {stage}, {load.in_flight} in flight", flush=True)
                await asyncio.to_thread(inject, injector, kind, stage)
                lacking = await until_whole(up, processes, session)
                if lacking:
                    print(f"NOT WHOLE after {WHOLE_WITHIN_S:g} s: {lacking}", flush=True)
                    break
    writer.close()
    return not lacking


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "history.jsonl"
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(Path(folder))
        # Ray would hold back the second of two similar lines, which `missing` looks for.
        with running_up(Path(folder), "--config", config, RAY_DEDUP_LOGS="0") as up:
            try:
                whole = asyncio.run(run(up, args, file))
            except KeyboardInterrupt:  # `run` has awaited what was in flight
                whole = True
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
    # One replica of each stage can carry this on two cores on which two others load.
    parser.add_argument("--rate", type=float, default=4, help="requests per second")
    parser.add_argument("--output", type=Path, default=Path("results/chaos"), help="folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
