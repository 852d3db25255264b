"""serveConfigV2 is valid for Ray and the application, and its replicas fit the pods."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
from pydantic import BaseModel
from ray.autoscaler._private.kuberay.autoscaling_config import _get_ray_resources_from_group_spec
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from blip2_serve import app
from blip2_serve.config import AppConfig
from blip2_serve.stage_config import ComputeConfig, StageConfig
from support.manifests import OVERLAYS, Object, build, ray_service, serve_config

Resources = dict[str, float]

STAGES = ("ingress", "preprocessor", "encoder", "generator")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_knows_every_key(overlay: str) -> None:
    config = serve_config(overlay)
    assert unknown_keys(config, ServeDeploySchema.model_validate(config)) == []


def unknown_keys(given: Any, parsed: Any) -> list[str]:
    """Returns keys that Ray's models have no field for; most of the models ignore them."""
    if isinstance(parsed, list):
        return [key for pair in zip(given, parsed, strict=True) for key in unknown_keys(*pair)]
    if not isinstance(parsed, BaseModel):
        return []
    found = []
    for key, value in given.items():
        known = key in type(parsed).model_fields
        found += unknown_keys(value, getattr(parsed, key)) if known else [key]
    return found


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(("http_option",), id="top level"),
        pytest.param(("http_options", "request_timeout"), id="HTTP options"),
        pytest.param(("applications", 0, "import_pat"), id="application"),
    ],
)
def test_unknown_keys_are_detected(path: tuple[Any, ...]) -> None:
    config = serve_config("prod")
    inner: Any = config
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = 1
    assert unknown_keys(config, ServeDeploySchema.model_validate(config)) == [path[-1]]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_builder_accepts_the_arguments(overlay: str) -> None:
    (application,) = serve_config(overlay)["applications"]
    module, _, name = application["import_path"].partition(":")
    assert getattr(importlib.import_module(module), name) is app.build
    AppConfig.model_validate(application["args"])  # unknown keys are errors there


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_stage_has_replicas_and_resources(overlay: str) -> None:
    (application,) = serve_config(overlay)["applications"]
    for stage in STAGES:
        given = application["args"][stage]
        assert ("num_replicas" in given) != ("autoscaling" in given)
        assert given.keys() >= {"num_cpus", "resources"}
        if "autoscaling" in given:
            AutoscalingConfig.model_validate(given["autoscaling"])
            # Everything else is decided by the application's own policy.
            assert given["autoscaling"].keys() == {
                "min_replicas",
                "max_replicas",
                "upscale_delay_s",
                "downscale_delay_s",
            }


# -- room ------------------------------------------------------------------------------------------


def stages(overlay: str) -> dict[str, StageConfig]:
    config = AppConfig.model_validate(serve_config(overlay)["applications"][0]["args"])
    return {stage: getattr(config, stage) for stage in STAGES}


def resources_of(stage: StageConfig) -> Resources:
    gpus = stage.num_gpus if isinstance(stage, ComputeConfig) else 0
    assert gpus is not None
    return {"CPU": stage.num_cpus, "GPU": gpus, **stage.resources}


def groups(overlay: str) -> dict[str, tuple[Resources, Object]]:
    """Returns the resources of a pod per group, as Ray's autoscaler reads them; "" is the head."""
    cluster = ray_service(build(overlay))["spec"]["rayClusterConfig"]
    head = _get_ray_resources_from_group_spec(cluster["headGroupSpec"], True)
    return {"": (head, {"minReplicas": 1, "maxReplicas": 1})} | {
        group["groupName"]: (_get_ray_resources_from_group_spec(group, False), group)
        for group in cluster["workerGroupSpecs"]
    }


def fits(requests: Resources, free: Resources) -> bool:
    return all(free.get(name, 0) >= amount - 1e-9 for name, amount in requests.items())


def unplaced(requests: list[Resources], nodes: list[Resources]) -> list[Resources]:
    """Places the largest first, each on the first node with room; returns those without one."""
    left = []
    for request in sorted(requests, key=lambda request: (-request["GPU"], -request["CPU"])):
        node = next((node for node in nodes if fits(request, node)), None)
        if node is None:
            left.append(request)
            continue
        for name, amount in request.items():
            node[name] = node.get(name, 0) - amount
    return left


@pytest.mark.parametrize(
    ("overlay", "pools"),
    [
        ("dev-cpu", dict.fromkeys(STAGES, "all")),
        (
            "gpu",
            {
                "ingress": "preprocess",
                "preprocessor": "preprocess",
                "encoder": "gpu",
                "generator": "gpu",
            },
        ),
        (
            "prod",
            {
                "ingress": "preprocess",
                "preprocessor": "preprocess",
                "encoder": "encode",
                "generator": "generate",
            },
        ),
    ],
)
def test_each_stage_only_fits_the_pods_of_its_group(overlay: str, pools: dict[str, str]) -> None:
    available = groups(overlay)
    found = {
        name: [group for group, (free, _) in available.items() if fits(resources_of(stage), free)]
        for name, stage in stages(overlay).items()
    }
    assert found == {stage: [group] for stage, group in pools.items()}


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("bound", ["min", "max"])
def test_the_fewest_and_the_most_replicas_fit_the_pods(overlay: str, bound: str) -> None:
    requests = []
    for stage in stages(overlay).values():
        scaling = stage.autoscaling or {}
        requests += [resources_of(stage)] * scaling.get(f"{bound}_replicas", stage.num_replicas)
    nodes = [
        dict(free)
        for free, group in groups(overlay).values()
        for _ in range(group[f"{bound}Replicas"])
    ]
    assert unplaced(requests, nodes) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_change_of_serve_finds_room_for_new_replicas_beside_the_old(overlay: str) -> None:
    """All that it may start from the fewest replicas; from the most, one of each stage at a time.

    Without room for one, the change would wait for ever.
    """
    fewest, most = [], []
    for stage in stages(overlay).values():
        scaling = stage.autoscaling or {}
        count = scaling.get("min_replicas", stage.num_replicas)
        surge = math.ceil(count * stage.max_surge_percent / 100)
        fewest += [resources_of(stage)] * (count + surge)
        most += [resources_of(stage)] * (scaling.get("max_replicas", stage.num_replicas) + 1)
        assert surge
    for requests in (fewest, most):
        nodes = [
            dict(free)
            for free, group in groups(overlay).values()
            for _ in range(group["maxReplicas"])
        ]
        assert unplaced(requests, nodes) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_two_ingress_replicas_answer_where_one_is_replaced(overlay: str) -> None:
    ingress = stages(overlay)["ingress"]
    assert (ingress.autoscaling or {}).get("min_replicas", ingress.num_replicas) >= 2


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_head_runs_no_replicas(overlay: str) -> None:
    free, _ = groups(overlay)[""]
    assert free["CPU"] == 0
    assert not {name for name, amount in free.items() if amount} - {"memory"}


def test_too_many_replicas_are_detected() -> None:
    free = {"CPU": 4.0, "GPU": 1.0, "pool": 1.0}
    request = {"CPU": 2.0, "GPU": 0.5, "pool": 0.5}
    assert unplaced([request] * 2, [dict(free)]) == []
    assert unplaced([request] * 3, [dict(free)]) == [request]
