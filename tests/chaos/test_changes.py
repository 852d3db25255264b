"""Changes of a running application, under load: nothing is lost, and no answer is mixed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from blip2_serve.demo import scenes
from support.checkpoints import Recipe, write_checkpoint
from support.cluster import RayNodes
from support.images import data_url
from tests.chaos import checker, history
from tests.chaos.deployed import (
    STAGES,
    check_nothing_lost,
    config,
    one_machine,
    overridden,
    total,
    under_load,
)
from tests.chaos.history import Choice, Exchange, Record, Sent
from tests.chaos.load import new_session, templates, undisturbed

pytestmark = pytest.mark.soak

RATE = 3.0  # requests per second, which the cores can answer while replicas start
TWO_INGRESSES = {"ingress": {"num_replicas": 2}}
LONG = {
    "image": data_url(scenes.sample(6_005).image),
    "max_tokens": 450,
    "n": 4,
    "temperature": 1,
    "ignore_eos": True,
    "stream": True,
}
COUNTS = {**dict.fromkeys(STAGES, 1), "Ingress": 2}


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with one_machine() as nodes:
        yield nodes


@pytest.fixture
def rounds(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.getoption("--changes"))


async def deploy(nodes: RayNodes, config: dict[str, object]) -> None:
    """Deploys in place of what runs, and returns once only new replicas are left."""

    def deploy() -> None:
        old = nodes.replica_ids(*STAGES) if nodes.is_deployed() else set()
        nodes.deploy(config)
        nodes.until_ready()
        nodes.until_replicas(COUNTS, old)

    await asyncio.to_thread(deploy)


async def test_more_and_fewer_replicas_lose_nothing(
    nodes: RayNodes, rounds: int, tmp_path: Path
) -> None:
    file, own = tmp_path / "history.jsonl", config(**TWO_INGRESSES)
    await deploy(nodes, own)
    async with under_load(nodes.url, file, RATE):
        for count in (3, 1) * rounds:
            counts = dict.fromkeys(("Encoder", "Generator"), count)
            options = {name: {"num_replicas": count} for name in counts}
            await asyncio.to_thread(nodes.deploy, overridden(own, options))
            await asyncio.to_thread(nodes.until_replicas, counts)
    check_nothing_lost(file)


async def test_a_changed_setting_loses_nothing(
    nodes: RayNodes, rounds: int, tmp_path: Path
) -> None:
    file = tmp_path / "history.jsonl"
    await deploy(nodes, config(**TWO_INGRESSES, generator={"stream_events_per_s": 300}))
    async with under_load(nodes.url, file, RATE):
        for number in range(rounds):
            setting = {"stream_events_per_s": 301 + number}
            await deploy(nodes, config(**TWO_INGRESSES, generator=setting))
    check_nothing_lost(file)


async def test_replicas_that_are_stopped_finish_their_answers(nodes: RayNodes) -> None:
    own = config(**TWO_INGRESSES, generator={"num_replicas": 1, "stream_events_per_s": 299})
    await deploy(nodes, own)
    await asyncio.to_thread(nodes.deploy, overridden(own, {"Generator": {"num_replicas": 2}}))
    await asyncio.to_thread(nodes.until_replicas, {"Generator": 2})
    before = total(nodes, "replays_total")
    begun, stopped = asyncio.Event(), asyncio.Event()
    ends: list[bytes] = []

    async def read_on(session: aiohttp.ClientSession) -> None:
        while not stopped.is_set():
            async with session.post(f"{nodes.url}/v1/generate", json=LONG) as response:
                await response.content.readline()
                begun.set()
                ends.append((await response.read()).rstrip()[-6:])

    async with new_session() as session:
        reading = [asyncio.create_task(read_on(session)) for _ in range(8)]
        await begun.wait()
        await asyncio.to_thread(nodes.deploy, own)
        await asyncio.to_thread(nodes.until_replicas, {"Generator": 1})
        stopped.set()
        await asyncio.gather(*reading)
    assert {*ends} == {b"[DONE]"}
    assert total(nodes, "replays_total") == before


async def test_answers_of_two_checkpoints_are_never_mixed(nodes: RayNodes, tmp_path: Path) -> None:
    """While one takes the place of the other, requests may be turned away."""
    file = tmp_path / "history.jsonl"
    first, second = (
        config(**TWO_INGRESSES, model=str(write_checkpoint(tmp_path / name, Recipe(name, seed))))
        for seed, name in enumerate("ab")
    )
    await deploy(nodes, first)
    async with under_load(nodes.url, file, RATE):
        await deploy(nodes, second)
    records = history.read(file)
    async with new_session() as session:
        some = templates(1, 1)
        answers = await undisturbed(session, nodes.url, some)
    others = {t.body["seed"]: answer for t, answer in zip(some, answers, strict=True)}
    assert {*others.values()}.isdisjoint(r.expected for r in records if isinstance(r, Sent))

    changed = [
        replace(r, expected=others[r.body["seed"]]) if isinstance(r, Sent) else r for r in records
    ]
    by_first, by_second = answered(records), answered(changed)
    assert by_first
    assert by_second
    rest = [e for e in history.exchanges(records) if e.sent.id not in by_first | by_second]
    wrong = [
        e for e in rest if not is_turned_away(e, (e.sent.expected, others[e.sent.body["seed"]]))
    ]
    assert wrong == []


def answered(records: Sequence[Record]) -> set[str]:
    """The requests that got their answer."""
    return {v.id for v in checker.check(records).verdicts if v.fault == checker.OK}


def is_turned_away(exchange: Exchange, answers: Sequence[tuple[Choice, ...]]) -> bool:
    """Whether a request got status 503, or an error after the beginning of one of the answers."""
    if exchange.status == 503:
        return True
    error, got = exchange.error, history.answer([event.data for event in exchange.events])
    return error is not None and any(
        all(begins(part, whole) for part, whole in zip(got, answer, strict=False))
        for answer in answers
    )


def begins(part: Choice, whole: Choice) -> bool:
    return whole.token_ids[: len(part.token_ids)] == part.token_ids
