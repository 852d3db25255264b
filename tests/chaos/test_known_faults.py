"""Faults of Ray that others have reported to ray-project/ray: none of them may show here."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import psutil
import pytest

from blip2_serve.demo import scenes
from support.cluster import RayNodes
from support.images import data_url, encode
from support.server import gather_at_most, wait_until
from tests.chaos.deployed import STAGES, check_nothing_lost, config, one_machine, total, under_load
from tests.chaos.faults import is_gone
from tests.chaos.history import Fault, now
from tests.chaos.load import new_session

pytestmark = pytest.mark.soak

RATE = 3.0  # requests per second
PICTURE = encode(scenes.sample(6_003).image)
LONG = {"ignore_eos": True, "max_tokens": 450, "stream": True}
CANCELLED, AT_ONCE, LONGEST_S = 300, 16, 1.0
STREAMS = 24
INGRESSES = 2
SETTLED_S = 10.0  # metrics have been collected since


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with one_machine() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def fixed(nodes: RayNodes) -> RayNodes:
    """One replica of each stage, and two ingresses."""
    nodes.deploy(config(ingress={"num_replicas": INGRESSES}, generator={"max_num_seqs": 8}))
    nodes.until_ready()
    nodes.until_replicas({**dict.fromkeys(STAGES, 1), "Ingress": INGRESSES})
    return nodes


async def test_cancelled_calls_do_not_run_on(fixed: RayNodes) -> None:
    """#52533: one cancelled child call in a hundred runs on."""
    rng = random.Random(1)
    wait_until(lambda: total(fixed, "request_generated_tokens_count") >= INGRESSES)  # warmed up
    ended = total(fixed, "request_generated_tokens_count")

    async def leave(session: aiohttp.ClientSession) -> None:
        # Another file each time, so that some are cancelled before they have features.
        picture = data_url(PICTURE + rng.randbytes(16))
        # With beams no answer ends before its client has left, however fast the machine.
        body = {**LONG, "image": picture, "num_beams": 5, "stream": rng.random() < 0.5}
        try:
            async with asyncio.timeout(rng.uniform(0, LONGEST_S)):
                async with session.post(f"{fixed.url}/v1/generate", json=body) as response:
                    await response.read()
        except TimeoutError:
            return
        assert response.status == httpx.codes.TOO_MANY_REQUESTS, "an answer came too soon"

    async with new_session() as session:
        await gather_at_most(AT_ONCE, [leave(session) for _ in range(CANCELLED)])
    await asyncio.to_thread(until_idle, fixed)
    assert total(fixed, "dropped_total", stage="generator") > CANCELLED / 10
    body = {"image": data_url(PICTURE), "max_tokens": 1}
    httpx.post(f"{fixed.url}/v1/generate", json=body, timeout=60).raise_for_status()
    wait_until(lambda: total(fixed, "request_generated_tokens_count") > ended)
    await asyncio.sleep(SETTLED_S)
    assert total(fixed, "request_generated_tokens_count") == ended + 1  # the last request's


def until_idle(nodes: RayNodes) -> None:
    wait_until(lambda: not total(nodes, "sequences_running") + total(nodes, "queue_depth"))


@pytest.mark.parametrize("upstream", ["Preprocessor", "Ingress"])
async def test_the_death_of_a_caller_removes_no_replica_behind_it(
    upstream: str, fixed: RayNodes, tmp_path: Path
) -> None:
    """#61758: a replica is taken for dead whose argument came from a dead one."""
    file, downstream = tmp_path / "history.jsonl", ("Encoder", "Generator")
    before = fixed.replica_ids(*downstream)
    counts = {name: len(found) for name, found in fixed.all_replicas().items()}
    async with under_load(fixed.url, file, RATE) as writer:
        for _ in range(3):
            old = fixed.replicas(upstream)
            victim = psutil.Process(old[0]["pid"])
            writer.add(Fault("kill", upstream, victim.pid, now()))
            victim.kill()
            await asyncio.to_thread(wait_until, partial(is_gone, victim))
            await asyncio.to_thread(fixed.until_replicas, counts)
            await asyncio.sleep(3)  # under load
    check_nothing_lost(file)
    assert fixed.replica_ids(*downstream) == before


async def test_streams_do_not_keep_replicas_from_being_stopped(nodes: RayNodes) -> None:
    """#61551: in throughput mode, streaming calls are counted as ongoing for ever."""
    soon = {"metrics_interval_s": 1, "look_back_period_s": 2, "downscale_delay_s": 3}
    scaling: dict[str, Any] = {"autoscaling": {"min_replicas": 1, "max_replicas": 2, **soon}}
    nodes.deploy(
        config(
            ingress={**scaling, "scaling": {"initial_ongoing_requests": 4}},
            generator={**scaling, "max_num_seqs": 8},
        )
    )
    nodes.until_ready()

    async def read(session: aiohttp.ClientSession) -> None:
        body = {**LONG, "image": data_url(PICTURE)}
        while True:
            async with session.post(f"{nodes.url}/v1/generate", json=body) as response:
                await response.read()

    scaled = ("Ingress", "Generator")
    async with new_session() as session:
        reading = [asyncio.create_task(read(session)) for _ in range(STREAMS)]
        await asyncio.to_thread(nodes.until_replicas, dict.fromkeys(scaled, 2))
        assert not any(task.done() for task in reading)
        for task in reading:
            task.cancel()
        await asyncio.wait(reading)
    await asyncio.to_thread(nodes.until_replicas, dict.fromkeys(scaled, 1))
