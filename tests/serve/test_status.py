"""What /v1/status tells of a running application."""

from __future__ import annotations

import asyncio

from blip2_serve.demo import scenes
from support.images import data_url
from support.oracle import Oracle
from support.server import App

NOBODY = {"starting": 0, "stopping": 0}


async def test_replicas_queues_and_capacities_of_each_stage(
    random_model: tuple[App, Oracle],
) -> None:
    app, _ = random_model
    body = {"image": data_url(scenes.sample(9_300).image), "max_tokens": 100, "ignore_eos": True}
    async with app.client() as client:
        requests = [
            asyncio.create_task(client.post("/v1/generate", json={**body, "prompt": str(number)}))
            for number in range(16)
        ]
        async with asyncio.timeout(60):
            while True:
                status = (await client.get("/v1/status")).json()
                if all(s["capacity_per_s"] and s["rate_per_s"] for s in status["stages"][1:]):
                    break
        answers = await asyncio.gather(*requests)
    assert {answer.status_code for answer in answers} == {200}
    assert status["ready"] is True
    ingress, *stages = status["stages"]
    assert ingress["replicas"] == {"running": 1, **NOBODY}
    assert [stage["name"] for stage in stages] == ["preprocessor", "encoder", "generator"]
    assert [stage["replicas"] for stage in stages] == [{"running": 2, **NOBODY}] * 3
    assert all(stage["waiting"] >= 0 for stage in stages)
