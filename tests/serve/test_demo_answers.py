"""The shipped checkpoint is accurate on held-out scenes, over HTTP with 16 requests in flight."""

from __future__ import annotations

import httpx

from blip2_serve.demo import scenes
from support.images import data_url, image_message
from support.server import App, gather_at_most

HELD_OUT = range(1_000, 1_060)
IN_FLIGHT = 16
RIGHT = 0.95


async def _chat(client: httpx.AsyncClient, messages: list[dict[str, object]]) -> str:
    response = await client.post("/v1/chat/completions", json={"messages": messages})
    assert response.status_code == httpx.codes.OK, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


async def test_at_least_95_percent_of_captions_are_exactly_right(demo: App) -> None:
    drawn = [scenes.sample(seed) for seed in HELD_OUT]

    async def caption(client: httpx.AsyncClient, scene: scenes.Scene) -> bool:
        response = await client.post("/v1/caption", json={"image": data_url(scene.image)})
        right: bool = response.json()["data"][0]["caption"] == scene.caption
        return right

    async with demo.client() as client:
        right = await gather_at_most(IN_FLIGHT, [caption(client, scene) for scene in drawn])
    assert sum(right) >= RIGHT * len(right), f"{sum(right)} of {len(right)}"


async def test_at_least_95_percent_of_answers_are_right(demo: App) -> None:
    questions = [
        (scene, turn) for s in HELD_OUT for scene in [scenes.sample(s)] for turn in scene.questions
    ]

    async def answer(client: httpx.AsyncClient, scene: scenes.Scene, turn: scenes.Turn) -> bool:
        return await _chat(client, [image_message(scene.image, turn[0])]) == turn[1]

    async with demo.client() as client:
        right = await gather_at_most(IN_FLIGHT, [answer(client, s, turn) for s, turn in questions])
    assert sum(right) >= RIGHT * len(right), f"{sum(right)} of {len(right)}"


async def test_at_least_95_percent_of_follow_up_answers_are_right(demo: App) -> None:
    drawn = [scenes.sample(seed) for seed in HELD_OUT]

    async def converse(client: httpx.AsyncClient, scene: scenes.Scene) -> list[bool]:
        (first, _), *later = scene.chat
        messages = [image_message(scene.image, first)]
        answer = await _chat(client, messages)
        right = []
        for question, expected in later:
            messages.append({"role": "assistant", "content": answer})
            messages.append({"role": "user", "content": question})
            answer = await _chat(client, messages)
            right.append(answer == expected)
        return right

    async with demo.client() as client:
        chats = await gather_at_most(IN_FLIGHT, [converse(client, scene) for scene in drawn])
    right = [turn for chat in chats for turn in chat]
    assert sum(right) >= RIGHT * len(right), f"{sum(right)} of {len(right)}"
