"""Pictures made to exhaust whoever decodes them: an answer each, and the others are served."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import psutil
import pytest
from ray import serve

from blip2_serve.config import PreprocessorConfig
from blip2_serve.demo import scenes
from support.bombs import BOMBS, flat
from support.images import data_url
from support.server import App, start_app

pytestmark = pytest.mark.long  # some use up the time that decoding has

AT_ONCE = 32
SIDE = 6300  # of a legal picture: just below the limit of pixels
WORKER_MB, REPLICA_MB = 60, 500  # a worker without a picture; the rest of the replica
SMALL_ONES = 10


@pytest.fixture(scope="module")
def app(base_url: str) -> Iterator[App]:
    app = start_app(base_url, "bombs", {"dtype": "float32"})
    yield app
    serve.delete(app.name)


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_answered_and_costs_nobody_else(name: str, app: App) -> None:
    bomb = BOMBS[name]()
    assert len(bomb) < 20 << 20
    answer = app.post("/v1/generate", json={"image": data_url(bomb), "max_tokens": 1})
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert answer.json()["error"]["code"] == "invalid_image"
    small = data_url(scenes.sample(9_200).image)
    assert app.post("/v1/generate", json={"image": small, "max_tokens": 1}).status_code == 200


async def test_many_legal_bombs_are_decoded_within_the_memory_that_is_configured(app: App) -> None:
    config = PreprocessorConfig()
    pictures = [data_url(flat(SIDE, SIDE, b"%d" % number)) for number in range(AT_ONCE)]
    assert config.max_pixels * 0.98 < SIDE * SIDE < config.max_pixels
    ended: list[str] = []

    async with app.client() as client:

        async def ask(name: str, picture: str) -> httpx.Response:
            answer = await client.post("/v1/generate", json={"image": picture, "max_tokens": 1})
            ended.append(name)
            return answer

        with measured_memory(app) as memory:
            bombs = [asyncio.create_task(ask("bomb", picture)) for picture in pictures]
            async with asyncio.timeout(60):
                while not ended:  # so the others are there by now
                    await asyncio.sleep(0.01)
            seeds = range(9_210, 9_210 + SMALL_ONES)
            small = [await ask("small", data_url(scenes.sample(seed).image)) for seed in seeds]
            answers = await asyncio.gather(*bombs)

    assert {answer.status_code for answer in (*answers, *small)} == {200}
    assert ended[-1] == "bomb"  # none of the small ones waited for the last of them
    most_mb = config.threads * (WORKER_MB + config.decode_memory_mb) + REPLICA_MB
    print(memory)
    assert SIDE * SIDE / 1e6 < memory.most_mb < most_mb


def test_without_these_limits_a_bomb_would_be_decoded(base_url: str) -> None:
    """The tests above would notice if nothing held a bomb back."""
    unlimited = {"max_pixels": 10**9, "decode_memory_mb": 8192, "decode_timeout_s": 60}
    app = start_app(base_url, "unlimited", {"preprocessor": unlimited, "dtype": "float32"})
    bomb = BOMBS["a flat PNG of 20,000 x 20,000"]()
    with measured_memory(app) as memory:
        answer = app.post("/v1/generate", json={"image": data_url(bomb), "max_tokens": 1})
    print(memory)
    serve.delete(app.name)
    assert answer.status_code == 200
    assert memory.most_mb > REPLICA_MB + PreprocessorConfig().max_pixels * 3 / 2**20


@dataclass
class Memory:
    most_mb: float = 0.0


@contextmanager
def measured_memory(app: App) -> Iterator[Memory]:
    """The largest sum of what the preprocessor's processes have for themselves."""
    title = f"ray::ServeReplica:{app.name}:Preprocessor"
    (replica,) = [p for p in psutil.process_iter(["cmdline"]) if title in (p.info["cmdline"] or ())]
    memory, done = Memory(), threading.Event()

    def sample() -> None:
        while not done.wait(0.05):
            total = 0
            for process in (replica, *replica.children(recursive=True)):
                try:
                    total += process.memory_full_info().uss
                except psutil.Error:  # it has ended meanwhile
                    continue
            memory.most_mb = max(memory.most_mb, total / 2**20)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield memory
    finally:
        done.set()
        thread.join()
