"""Stages that scale to zero: idle replicas stop, and the next request waits for a new one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve

from blip2_serve.app import build
from blip2_serve.config import AppConfig
from blip2_serve.demo import scenes
from support.images import data_url
from support.monitoring import needs, prometheus, rule_groups
from support.server import App, start_app, wait_until

pytestmark = pytest.mark.long

IDLE, NEVER = "idle", "never"
SCENE = scenes.sample(6_001)


def replicas(stage: str) -> int:
    states = serve.status().applications[IDLE].deployments[stage].replica_states
    return sum(states.values())


@pytest.fixture(scope="module")
def idle(base_url: str) -> Iterator[App]:
    """An application whose encoder and generator have scaled to zero."""
    soon = {"downscale_to_zero_delay_s": 1, "look_back_period_s": 2, "metrics_interval_s": 1}
    stage = {"autoscaling": {"min_replicas": 0, "max_replicas": 1, **soon}}
    app = start_app(base_url, IDLE, {"dtype": "float32", "encoder": stage, "generator": stage})
    wait_until(lambda: replicas("Generator") == replicas("Encoder") == 0)
    yield app
    serve.delete(IDLE)


@pytest.fixture
def unschedulable(idle: App) -> Iterator[str]:
    """Deploys another application, whose preprocessor fits no node; yields its name."""
    assert idle.name != NEVER
    light: dict[str, Any] = {
        stage: {"num_cpus": 0} for stage in ("ingress", "preprocessor", "encoder", "generator")
    }
    light["preprocessor"]["resources"] = {"nowhere": 1}
    light["request_timeout_s"] = 5  # Serve gives a replica its grace even if it has never started
    target = serve.RunTarget(
        build(AppConfig.model_validate(light)), name=NEVER, route_prefix=f"/{NEVER}"
    )
    serve.run_many(
        [target],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )
    yield NEVER
    serve.delete(NEVER)


def test_alerts_fire_for_a_stage_that_never_started_but_not_for_one_at_zero(
    idle: App, unschedulable: str, tmp_path: Path
) -> None:
    needs("prometheus")
    alerts = {
        rule["alert"]: rule["expr"]
        for group in rule_groups()
        for rule in group["rules"]
        if "alert" in rule
    }
    with prometheus(tmp_path, {"blip2": f"{idle.url.removeprefix('http://')}/metrics"}) as scraping:
        # Wait until every metric that the alerts use exists for both applications.
        scraping.wait_for(
            f'count(ray_serve_autoscaling_target_replicas{{application="{IDLE}"}}) == 4'
        )
        for stage in ("Encoder", "Generator"):
            labels = f'application="{IDLE}", deployment="{stage}"'
            scraping.wait_for(f"ray_serve_autoscaling_target_replicas{{{labels}}} == 0")
        healthy = f'ray_serve_deployment_replica_healthy{{application="{unschedulable}"}} == 1'
        scraping.wait_for(f"count({healthy}) == 3", within_s=120)
        lost = stages(scraping.query(alerts["Blip2NoReadyReplica"]))
        not_started = stages(scraping.query(alerts["Blip2StageDoesNotStart"]))
    assert lost == set()
    assert not_started == {(unschedulable, "Preprocessor")}


def stages(samples: list[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(s["metric"]["application"], s["metric"]["deployment"]) for s in samples}


def test_the_first_request_after_scaling_to_zero_waits_and_succeeds(idle: App) -> None:
    assert replicas("Preprocessor") == 1
    assert replicas("Generator") == replicas("Encoder") == 0

    answer = idle.post("/v1/caption", json={"image": data_url(SCENE.image)})

    assert answer.status_code == httpx.codes.OK, answer.text
    assert answer.json()["data"][0]["caption"] == SCENE.caption
    assert replicas("Generator") == 1
