"""Clients that leave, at any stage of their request, take all of it with them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from ray import serve

from blip2_serve.demo import scenes
from support.images import data_url, encode
from support.planted import Planted, start_planted
from support.server import gather_at_most

pytestmark = pytest.mark.long  # hundreds of clients come and go
URL = "/v1/generate"
PICTURES = [data_url(scenes.sample(seed).image) for seed in range(8_000, 8_006)]
LONG = {"image": PICTURES[0], "max_tokens": 200, "ignore_eos": True}
WITHIN_S = 30.0
MEMORY_BYTES = 32 << 20  # by which a replica may grow; the bodies of those who leave are 240 MB


@pytest.fixture(scope="module")
def app(base_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planted]:
    """One picture is decoded at a time, and a request of eight sequences fills the engine."""
    folder = tmp_path_factory.mktemp("leaving")
    config = {
        "generator": {"max_num_seqs": 8},
        "preprocessor": {"threads": 1},
        "ingress": {"admission": {"min_requests": 64}},  # nobody is refused
    }
    app = start_planted(base_url, "leaving", folder, config)
    yield app
    serve.delete(app.name)


@pytest.fixture(params=[False, True], ids=["whole", "streamed"])
def stream(request: pytest.FixtureRequest) -> bool:
    streamed: bool = request.param
    return streamed


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not await condition():
            await asyncio.sleep(0.005)


async def exists(path: Path) -> bool:
    return path.exists()


@contextlib.asynccontextmanager
async def asking(app: Planted, body: dict[str, Any]) -> AsyncIterator[asyncio.Task[httpx.Response]]:
    """Has a client ask during the block; at its end the client leaves, if it is still there."""
    async with app.client() as client:
        task = asyncio.create_task(client.post(URL, json=body))
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def in_ingress(app: Planted, name: str) -> float:
    """What the ingress counts, without the errors of adding and subtracting."""
    return round(float((await app.stats("Ingress"))[name]), 6)


async def until_ingress_is_idle(app: Planted) -> None:
    async def idle() -> bool:
        return not any(round(float(count), 6) for count in (await app.stats("Ingress")).values())

    try:
        await until(idle)
    except TimeoutError:
        pytest.fail(f"the ingress still holds {await app.stats('Ingress')}")


async def until_nothing_is_left(app: Planted) -> dict[str, Any]:
    """Waits until no stage holds anything, and returns the generator's stats."""
    await until_ingress_is_idle(app)

    async def idle() -> bool:
        decoding = (await app.stats("Preprocessor"))["ongoing"]
        encoder = await app.stats("Encoder")
        encoding = encoder["waiting"] or encoder["busy"]
        engine = await app.stats("Generator")
        return not (decoding or encoding or engine["running"] or engine["waiting"])

    await until(idle)
    engine = await app.stats("Generator")
    assert engine["readers"] == 0
    assert engine["wrong"] is None
    assert engine["kv_slots_used"] == engine["kv_slots_cached"]
    return engine


async def test_while_its_body_is_read(app: Planted) -> None:
    host, port, path = re.fullmatch(r"http://([^:]+):(\d+)(.*)", app.url + URL).groups()  # type: ignore[union-attr]
    _, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps(LONG).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body[: len(body) // 2])
    await writer.drain()
    await until(lambda: in_ingress(app, "slow_bodies"))
    assert await in_ingress(app, "bytes") == len(body) // 2
    assert await in_ingress(app, "answers") == 0

    writer.close()

    await until_nothing_is_left(app)


async def test_while_its_picture_waits_for_a_decoder(
    app: Planted, stream: bool, tmp_path: Path
) -> None:
    async def ongoing() -> int:
        count: int = (await app.stats("Preprocessor"))["ongoing"]
        return count

    os.mkfifo(pipe := tmp_path / "pipe")
    async with asking(app, {**LONG, "image": data_url(b"do:wait %b" % bytes(pipe))}):
        await until(ongoing)
        touched = tmp_path / "touched"
        touch = data_url(b"do:touch %b" % bytes(touched))
        async with asking(app, {**LONG, "image": touch, "stream": stream}):
            await until(lambda: is_equal(ongoing, 2))
        await until(lambda: is_equal(ongoing, 1))
        pipe.write_bytes(b"")
        await until(lambda: is_equal(ongoing, 0))
    await until_nothing_is_left(app)
    assert not touched.exists()


async def is_equal(count: Callable[[], Awaitable[int]], expected: int) -> bool:
    return await count() == expected


async def test_while_its_picture_is_decoded(app: Planted, stream: bool, tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    images = (await app.stats("Encoder"))["images"]
    picture = data_url(b"do:wait %b" % bytes(pipe))

    async def is_decoded() -> bool:
        return bool((await app.stats("Preprocessor"))["ongoing"])

    async with asking(app, {**LONG, "image": picture, "stream": stream}):
        await until(is_decoded)
    await until_nothing_is_left(app)
    pipe.write_bytes(b"")  # waits until the decoder reads
    assert (await app.stats("Encoder"))["images"] == images


@pytest.mark.parametrize("waits", [False, True], ids=["in a batch", "before it"])
async def test_while_its_picture_is_encoded(app: Planted, stream: bool, waits: bool) -> None:
    before, steps = await app.stats("Encoder"), (await app.stats("Generator"))["steps"]
    body = {**LONG, "stream": stream, "image": data_url(scenes.sample(8_100 + 2 * stream).image)}
    other = {**body, "image": data_url(scenes.sample(8_101 + 2 * stream).image)}

    async def calls() -> int:
        count: int = (await app.stats("Encoder"))["calls"]
        return count

    async with contextlib.AsyncExitStack() as clients:
        with app.held("encode") as holds:
            first = await clients.enter_async_context(asking(app, body))
            await until(lambda: exists(holds))
            if waits:
                async with asking(app, other):
                    await until(lambda: is_equal(calls, 2))
                await until(lambda: is_equal(calls, 1))
            else:
                await clients.aclose()
                await until_ingress_is_idle(app)
        if waits:
            assert (await first).status_code == 200
    engine = await until_nothing_is_left(app)

    async def encoded() -> int:
        images: int = (await app.stats("Encoder"))["images"]
        return images - before["images"]

    await until(encoded)
    assert await encoded() == 1
    assert (engine["steps"] == steps) == (not waits)


async def test_while_it_waits_for_the_generator(app: Planted, stream: bool) -> None:
    async def readers() -> int:
        count: int = (await app.stats("Generator"))["readers"]
        return count

    before = (await until_nothing_is_left(app))["steps"]
    filling = {**LONG, "prompt": f"one {stream}", "n": 8, "temperature": 1}
    async with asking(app, filling) as first:
        with app.held("decode") as holds:
            await until(lambda: exists(holds))
            async with asking(app, {**LONG, "stream": stream, "prompt": "two"}):
                await until(lambda: is_equal(readers, 2))
            await until(lambda: is_equal(readers, 1))
        assert (await first).status_code == 200
    engine = await until_nothing_is_left(app)
    assert engine["steps"] - before <= LONG["max_tokens"] + 1


@pytest.mark.parametrize("phase", ["prefill", "decode"])
async def test_while_it_is_answered(app: Planted, stream: bool, phase: str) -> None:
    """No further step works for it."""
    prompt = f"in {phase} {stream}"
    with app.held(phase) as holds:
        async with asking(app, {**LONG, "stream": stream, "prompt": prompt}):
            await until(lambda: exists(holds))
            engine = await app.stats("Generator")
            assert engine["running"] == 1
            assert engine["readers"] == 1
        await until_ingress_is_idle(app)

        async def has_left() -> bool:
            return not (await app.stats("Generator"))["readers"]

        await until(has_left)
    assert (await until_nothing_is_left(app))["steps"] == engine["steps"]


# -- many -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.soak)])
async def test_clients_that_leave_at_random_moments_leave_nothing_behind(
    app: Planted, count: int
) -> None:
    rng = random.Random(count)
    await gather_at_most(8, [leave(app, rng, rng.expovariate(10)) for _ in range(count // 5)])
    await until_nothing_is_left(app)
    before = memory(app)

    left = await gather_at_most(8, [leave(app, rng, rng.expovariate(10)) for _ in range(count)])

    await until_nothing_is_left(app)
    after = memory(app)
    assert sum(left) > count / 2
    assert before.keys() == after.keys()
    growth = {name: after[name] - before[name] for name in before}
    print(f"{sum(left)} of {count} left; grown by {growth} bytes")
    assert all(size < MEMORY_BYTES for size in growth.values())
    assert app.post(URL, json={**LONG, "max_tokens": 3}).status_code == 200


async def leave(app: Planted, rng: random.Random, after_s: float) -> bool:
    """Asks for something and leaves after so many seconds; returns whether that was too early."""
    options: list[dict[str, Any]] = [{}, {"n": 3, "temperature": 1}, {"num_beams": 4}]
    pixels = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (300, 300, 3), np.uint8)
    new = data_url(encode(Image.fromarray(pixels), compress_level=0))
    body = {
        "image": rng.choice([new, *PICTURES[:2]]),
        "stream": rng.random() < 0.5,
        "max_tokens": rng.choice([1, 50, 200]),
        "ignore_eos": True,
        **rng.choice(options),
    }
    async with app.client() as client:
        try:
            async with asyncio.timeout(after_s):
                response = await client.post(URL, json=body)
        except TimeoutError:
            return True
    assert response.status_code == 200
    return False


def replicas(app: Planted) -> list[tuple[str, psutil.Process]]:
    """The stage and the process of each."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = "".join(process.cmdline()[:1])
            if stage := re.search(rf"ServeReplica:{app.name}:(\w+)", title):
                found.append((stage[1], process))
    assert len(found) == 4
    return found


def memory(app: Planted) -> dict[str, int]:
    """Resident bytes of each replica."""
    return {f"{stage} {p.pid}": p.memory_info().rss for stage, p in replicas(app)}


TOKENS = 1000  # of an answer, one in each step


@pytest.mark.soak
async def test_how_soon_its_slots_are_free(app: Planted) -> None:
    """Prints it. How fast the machine is makes no difference to the engine's steps until then."""
    seconds, steps = [], []
    for number in range(200):
        more = {"n": 8, "temperature": 1, "max_tokens": TOKENS, "stream": True}
        async with app.client() as client:
            body = {**LONG, **more, "prompt": f"number {number}"}
            async with client.stream("POST", URL, json=body) as answer:
                await anext(answer.aiter_lines())
                before = await app.stats("Generator")
            began = time.perf_counter()
            while (after := await app.stats("Generator"))["running"]:
                pass
            if before["running"]:  # else the answer was over before anyone looked
                seconds.append(time.perf_counter() - began)
                steps.append(after["steps"] - before["steps"])
    seconds.sort()
    assert len(seconds) > 20
    middle = seconds[len(seconds) // 2]
    print(
        f"slots are free after {middle:.3f} s (p50 of {len(seconds)}), {seconds[-1]:.3f} s at most"
    )
    assert max(steps) < TOKENS / 4
