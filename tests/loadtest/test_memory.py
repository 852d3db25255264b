"""The requests of the memory benchmark, and its growth and table."""

from __future__ import annotations

import asyncio
import json
from itertools import islice

import pytest
from aiohttp import web

from blip2_serve.config import AppConfig
from blip2_serve.model.source import DEMO_FOLDER
from loadtest.answers import WrongAnswer
from loadtest.bench.memory import GROUPS, Visit, drive, growth, table, visits
from loadtest.bench.servers import ProcessMemory
from loadtest.bench.workload import Request
from support.fake_server import serving, whole


def sample(encoder: float, raylet: float) -> list[ProcessMemory]:
    """Two processes with these megabytes."""
    return [
        ProcessMemory(7, "raylet", int(raylet * 1e6)),
        ProcessMemory(9, "ServeReplica:app:Encoder", int(encoder * 1e6)),
    ]


def test_equal_seeds_make_equal_visits() -> None:
    first, second, other = (list(islice(visits(seed), 50)) for seed in (1, 1, 2))

    assert first == second
    assert first != other


def test_the_first_thousand_visits_fill_the_servers_caches() -> None:
    config = AppConfig()
    text = json.loads((DEMO_FOLDER / "config.json").read_text())["text_config"]
    first = [v for v in islice(visits(0), 1000) if v.leaves_after_s is None]

    # Each answered token takes a KV slot, which stays cached while there is room.
    answered = sum(visit.request.tokens for visit in first)
    assert answered > config.generator.max_num_seqs * text["max_position_embeddings"]
    assert len({v.request.picture for v in first}) > config.ingress.feature_cache_entries


def test_visits_are_of_every_kind() -> None:
    some = list(islice(visits(0), 1000))

    for is_kind in (
        lambda v: v.stream,
        lambda v: v.leaves_after_s is not None,
        lambda v: not v.request.question,
        lambda v: len(v.request.earlier) == 1,
        lambda v: len(v.request.earlier) == 2,
        lambda v: v.request.more.get("num_beams"),
        lambda v: v.request.more.get("n"),
        lambda v: v.request.more.get("temperature"),
    ):
        assert 20 <= sum(map(bool, map(is_kind, some))) <= 500


async def test_users_ask_at_once_and_some_leave_before_they_are_answered() -> None:
    most = in_flight = 0
    released = asyncio.Event()
    short, endless = (Request("what is it?", "data:,", tokens) for tokens in (3, 4))

    async def handler(request: web.Request) -> web.Response:
        nonlocal most, in_flight
        tokens = (await request.json())["max_tokens"]
        in_flight += 1
        most = max(most, in_flight)
        await (asyncio.sleep(0.05) if tokens == short.max_tokens else released.wait())
        in_flight -= 1
        return web.json_response(whole(tokens, text=""))

    coming = [Visit(short, False, None), Visit(endless, False, 0.05)] * 4
    async with serving(handler) as endpoint:
        await drive(endpoint, iter(coming), users=4)  # ends only if the others leave
        released.set()

    assert most >= 4


async def test_a_wrong_answer_ends_the_benchmark() -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.json_response(whole(2))

    visit = Visit(Request("what is it?", "data:,", 3), False, None)
    async with serving(handler) as endpoint:
        with pytest.raises(WrongAnswer, match="2 tokens instead of 3"):
            await drive(endpoint, iter([visit] * 4), users=2)


def test_growth_of_a_group_compares_the_last_sample_with_the_first() -> None:
    samples = {1000: sample(100, 50), 2000: sample(500, 50), 3000: sample(130, 50)}

    assert growth(samples, GROUPS["replicas"]) == pytest.approx(0.3)
    assert growth(samples, GROUPS["Ray and the command"]) == 0
    assert growth(samples, GROUPS["together"]) == pytest.approx(0.2)


def test_the_table_starts_with_replicas_and_ends_with_sums() -> None:
    late = ProcessMemory(8, "IDLE", 5_000_000)
    rows = table({1000: sample(100, 50), 2000: [*sample(110, 50), late]}).splitlines()

    assert rows[0] == "| process | 1,000 | 2,000 | growth |"
    assert rows[2] == "| ServeReplica:app:Encoder (9) | 100.0 | 110.0 | +10.0% |"
    assert rows[3] == "| raylet (7) | 50.0 | 50.0 | +0.0% |"
    assert rows[4] == "| IDLE (8) | 0.0 | 5.0 | new |"
    assert rows[-1] == "| together | 150.0 | 165.0 | +10.0% |"
