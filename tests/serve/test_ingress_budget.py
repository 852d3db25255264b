"""Several ingress replicas share what the stages can do: they admit no more than one would."""

from __future__ import annotations

import asyncio
from statistics import mean

import aiohttp
import pytest
from ray import serve

from blip2_serve.demo import scenes
from support.images import data_url
from support.server import App, start_app

pytestmark = pytest.mark.soak

REPLICAS = (1, 3)
WITHIN = 0.2
OFFERED_PER_S = 60.0  # several times what the generator can do
LEARNING_S, MEASURED_S, SAMPLED_EVERY_S = 20.0, 40.0, 0.2
BODY = {"image": data_url(scenes.sample(6_004).image), "max_tokens": 60, "ignore_eos": True}


async def test_the_work_in_flight_does_not_depend_on_the_number_of_ingresses(
    base_url: str,
) -> None:
    in_flight = {}
    for replicas in REPLICAS:
        config = {
            "dtype": "float32",
            "ingress": {"num_replicas": replicas, "admission": {"max_wait_s": 4}},
            "generator": {"max_num_seqs": 8},
        }
        app = await asyncio.to_thread(start_app, base_url, f"budget-{replicas}", config)
        in_flight[replicas] = await overloaded(app)
        await asyncio.to_thread(serve.delete, app.name)
    print(in_flight)
    one, several = in_flight.values()
    assert several == pytest.approx(one, rel=WITHIN)


async def overloaded(app: App) -> float:
    """Requests in the generator while more are offered than it can do, on average."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        offering = asyncio.create_task(offer(session, app.url))
        try:
            await asyncio.sleep(LEARNING_S)
            samples = []
            for _ in range(round(MEASURED_S / SAMPLED_EVERY_S)):
                stats = await app.stats("Generator")
                samples.append(stats["running"] + stats["waiting"])
                await asyncio.sleep(SAMPLED_EVERY_S)
        finally:
            offering.cancel()
            await asyncio.wait([offering])
    return mean(samples)


async def offer(session: aiohttp.ClientSession, url: str) -> None:
    """Sends requests at a steady rate, whatever becomes of them."""

    async def ask() -> None:
        async with session.post(f"{url}/v1/generate", json=BODY) as response:
            await response.read()

    async with asyncio.TaskGroup() as group:
        while True:
            group.create_task(ask())
            await asyncio.sleep(1 / OFFERED_PER_S)
