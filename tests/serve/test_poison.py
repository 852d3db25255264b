"""Pictures that kill or hang their decoder, and a request that kills its engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from ray import serve

from blip2_serve.demo import scenes
from support.images import data_url
from support.planted import KILLER, Planted, start_planted
from support.server import wait_until

pytestmark = pytest.mark.long  # replicas die and start again
URL = "/v1/generate"
INNOCENT = 31
PATIENCE_S = 600  # replicas that die are started again twice, on a machine that may be busy
PICTURES = [data_url(scenes.sample(seed).image) for seed in range(8_200, 8_204)]


@pytest.fixture(scope="module")
def app(base_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planted]:
    config = {
        "generator": {"num_replicas": 2},
        "request_timeout_s": PATIENCE_S,
        "preprocessor": {"decode_timeout_s": 0.5},
        "ingress": {"admission": {"min_requests": 64}},
    }
    app = start_planted(base_url, "poison", tmp_path_factory.mktemp("poison"), config)
    yield app
    serve.delete(app.name)


@pytest.mark.parametrize(
    ("command", "message"),
    [(b"crash", "makes its decoder crash"), (b"spin", "takes longer"), (b"sleep", "takes longer")],
)
async def test_a_picture_that_kills_or_hangs_its_decoder_is_a_400(
    command: bytes, message: str, app: Planted
) -> None:
    seeds = range(8_300 + 10 * len(message), 8_300 + 10 * len(message) + 8)
    innocent = [data_url(scenes.sample(seed).image) for seed in seeds]
    async with app.client() as client:

        async def ask(picture: str) -> httpx.Response:
            return await client.post(URL, json={"image": picture, "max_tokens": 3})

        poison = data_url(b"do:" + command)
        answers = await asyncio.gather(*map(ask, [poison, *innocent, poison]))
        # Every worker is back: there are two, and each has to be for all of these to be decoded.
        more = [data_url(b"do: " + bytes([number])) for number in range(8)]
        after = await asyncio.gather(*map(ask, more))

    assert [answer.status_code for answer in answers] == [400, *[200] * len(innocent), 400]
    error = answers[0].json()["error"]
    assert error["code"] == "invalid_image"
    assert message in error["message"]
    assert {answer.status_code for answer in after} == {200}
    assert app.deaths == 0


def innocents() -> list[dict[str, Any]]:
    """Requests of every kind, whose answers another replica must not change."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1, "seed": 7},
        {"n": 2, "temperature": 1, "seed": 8},
        {"num_beams": 3},
    ]
    return [
        {
            "image": PICTURES[number % len(PICTURES)],
            "prompt": f"number {number}",
            "max_tokens": 60 + number,
            "ignore_eos": True,
            "stream": number % 2 == 0,
            **kinds[number % 4],
        }
        for number in range(INNOCENT)
    ]


def texts(response: httpx.Response) -> dict[int, str]:
    """The text of each answer."""
    assert response.status_code == 200, response.text
    if not response.headers["content-type"].startswith("text/event-stream"):
        return {choice["index"]: choice["text"] for choice in response.json()["choices"]}
    *events, last = response.text.strip().split("\n\n")
    assert last == "data: [DONE]"
    found: dict[int, str] = {}
    for event in events:
        for choice in json.loads(event.removeprefix("data: "))["choices"]:
            found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
    return found


async def test_a_request_that_kills_its_engine_is_given_up_and_costs_no_other_one(
    app: Planted,
) -> None:
    async with httpx.AsyncClient(base_url=app.url, timeout=PATIENCE_S) as client:

        async def ask(body: dict[str, Any]) -> httpx.Response:
            return await client.post(URL, json=body)

        async def in_flight() -> int:
            calls: int = (await app.stats("Ingress"))["calls"]
            return calls

        undisturbed = [texts(await ask(body)) for body in innocents()]
        killer = {"image": PICTURES[0], "prompt": KILLER, "max_tokens": 5}
        with app.held("decode"):
            others = [asyncio.create_task(ask(body)) for body in innocents()]
            async with asyncio.timeout(60):
                while await in_flight() < INNOCENT:
                    await asyncio.sleep(0.01)
            killing = asyncio.create_task(ask(killer))
            # So each of the others is in flight at two deaths, and suspect.
            await asyncio.to_thread(wait_until, lambda: app.deaths >= 2)
        answers = [texts(answer) for answer in await asyncio.gather(*others)]
        killed = await killing
        again = await ask(killer)

    assert answers == undisturbed
    for response in (killed, again):
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "quarantined"
        assert response.headers["x-should-retry"] == "false"
    assert app.deaths == 3
