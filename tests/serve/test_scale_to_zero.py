"""A stage that may have no replica: an idle one goes, and the next request waits for a new one."""

from __future__ import annotations

import httpx
from ray import serve

from blip2_serve.demo import scenes
from support.server import data_url, start_app, wait_until

NAME = "idle"
SCENE = scenes.sample(6_001)


def replicas(stage: str) -> int:
    states = serve.status().applications[NAME].deployments[stage].replica_states
    return sum(states.values())


def test_the_first_request_after_a_rest_waits_and_succeeds(base_url: str) -> None:
    soon = {"downscale_to_zero_delay_s": 1, "look_back_period_s": 2, "metrics_interval_s": 1}
    stage = {"autoscaling": {"min_replicas": 0, "max_replicas": 1, **soon}}
    app = start_app(base_url, NAME, {"dtype": "float32", "encoder": stage, "generator": stage})
    wait_until(lambda: replicas("Generator") == replicas("Encoder") == 0)
    assert replicas("Preprocessor") == 1

    answer = app.post("/v1/caption", json={"image": data_url(SCENE.image)})

    assert answer.status_code == httpx.codes.OK, answer.text
    assert answer.json()["data"][0]["caption"] == SCENE.caption
    assert replicas("Generator") == 1
    serve.delete(NAME)
