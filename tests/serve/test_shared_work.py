"""Requests share work, and work stops when its client disconnects."""

from __future__ import annotations

import asyncio

from blip2_serve.demo import scenes
from support.images import data_url, image_message
from support.server import App

LONG = {"max_tokens": 400, "ignore_eos": True}


async def test_one_image_from_32_concurrent_clients_is_encoded_once(demo: App) -> None:
    before = (await demo.stats("Encoder"))["images"]
    body = {"image": data_url(scenes.sample(3_001).image)}
    async with demo.client() as client:
        answers = await asyncio.gather(*(client.post("/v1/caption", json=body) for _ in range(32)))
    assert {a.status_code for a in answers} == {200}
    assert len({a.json()["data"][0]["caption"] for a in answers}) == 1
    assert (await demo.stats("Encoder"))["images"] == before + 1


async def test_several_images_of_one_request_are_captioned(demo: App) -> None:
    """Calls of one request to one stage at the same moment: Ray Serve would lose one of them."""
    images = [data_url(scenes.sample(3_050 + i).image) for i in range(4)]
    async with demo.client() as client:
        alone = [await client.post("/v1/caption", json={"image": image}) for image in images]
        body = {"images": [*images, *images]}
        for _ in range(5):
            together = await client.post("/v1/caption", json=body, timeout=30)
            captions = [item["caption"] for item in together.json()["data"]]
            assert captions == 2 * [answer.json()["data"][0]["caption"] for answer in alone]


async def test_concurrent_images_are_encoded_in_batches(demo: App) -> None:
    before = await demo.stats("Encoder")
    bodies = [{"image": data_url(scenes.sample(3_100 + i).image)} for i in range(48)]
    async with demo.client() as client:
        answers = await asyncio.gather(*(client.post("/v1/caption", json=b) for b in bodies))
    assert {a.status_code for a in answers} == {200}
    after = await demo.stats("Encoder")
    assert after["images"] - before["images"] == len(bodies)
    assert after["batches"] - before["batches"] < len(bodies)


async def test_stages_count_images_and_seconds(demo: App) -> None:
    stages = ("Preprocessor", "Encoder")
    before = [await demo.stats(stage) for stage in stages]
    async with demo.client() as client:
        await client.post("/v1/caption", json={"image": data_url(scenes.sample(3_150).image)})
    after = [await demo.stats(stage) for stage in stages]
    for old, new in zip(before, after, strict=True):
        assert new["images"] == old["images"] + 1
        assert 0 < new["seconds"] - old["seconds"] < 60


async def test_a_disconnect_does_not_cancel_an_encode_that_another_client_shares(demo: App) -> None:
    async with demo.client() as client:
        for seed in range(3_200, 3_210):
            body = {"image": data_url(scenes.sample(seed).image)}
            leaving = asyncio.create_task(client.post("/v1/caption", json=body))
            staying = asyncio.create_task(client.post("/v1/caption", json=body))
            await asyncio.sleep(0.01)  # cancels in a different phase each time
            leaving.cancel()
            answer = await staying
            assert answer.status_code == 200, answer.text


async def test_a_disconnect_while_streaming_frees_the_engine(
    demo: App,
) -> None:
    steps = (await demo.stats("Generator"))["steps"]
    body = {"messages": [image_message(scenes.sample(3_300).image)], "stream": True, **LONG}
    async with (
        demo.client() as client,
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        lines = response.aiter_lines()
        for _ in range(3):
            await anext(lines)
        assert (await demo.stats("Generator"))["running"] == 1
    after = await demo.until_idle()
    assert after["steps"] - steps < LONG["max_tokens"]
    assert after["kv_slots_used"] == after["kv_slots_cached"]


async def test_a_disconnect_during_a_beam_search_frees_the_engine(
    demo: App,
) -> None:
    steps = (await demo.stats("Generator"))["steps"]
    body = {"image": data_url(scenes.sample(3_302).image), "num_beams": 4, **LONG}
    async with demo.client() as client:
        request = asyncio.create_task(client.post("/v1/generate", json=body))
        while (await demo.stats("Generator"))["running"] < 4:
            await asyncio.sleep(0.01)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
    after = await demo.until_idle()
    assert after["steps"] - steps < LONG["max_tokens"]
    assert after["kv_slots_used"] == after["kv_slots_cached"]


async def test_a_chat_that_continues_another_only_computes_its_new_tokens(
    demo: App,
) -> None:
    messages = [image_message(scenes.sample(3_303).image, "what is in this picture?")]
    async with demo.client() as client:
        first = await client.post("/v1/chat/completions", json={"messages": messages})
        before = (await demo.until_idle())["cached_tokens"]
        answer = first.json()["choices"][0]["message"]["content"]
        messages += [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "what color is the background?"},
        ]
        second = await client.post("/v1/chat/completions", json={"messages": messages})
    assert second.status_code == 200, second.text
    reused = (await demo.until_idle())["cached_tokens"] - before
    # At least the whole first prompt: image and question.
    assert reused >= first.json()["usage"]["prompt_tokens"]
    assert reused < second.json()["usage"]["prompt_tokens"]


async def test_a_disconnect_without_streaming_frees_the_engine(
    demo: App,
) -> None:
    steps = (await demo.stats("Generator"))["steps"]
    body = {"image": data_url(scenes.sample(3_301).image), **LONG}
    async with demo.client() as client:
        request = asyncio.create_task(client.post("/v1/generate", json=body))
        while (await demo.stats("Generator"))["running"] == 0:
            await asyncio.sleep(0.01)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
    assert (await demo.until_idle())["steps"] - steps < LONG["max_tokens"]
