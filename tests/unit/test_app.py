"""Placement: what each stage's replicas reserve, by device and by number of GPUs."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from ray.serve._private.autoscaling_state import _resolve_policy_callable
from ray.serve.config import AutoscalingConfig

from blip2_serve import app, environment
from blip2_serve.config import AppConfig, GeneratorConfig
from blip2_serve.stage_config import AUTOSCALING_DEFAULTS


def placements(
    config: dict[str, Any], gpus: int, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Returns deployments by name, as built on a cluster with this number of GPUs."""
    monkeypatch.setattr(app, "visible_gpus", lambda: gpus)
    placed: dict[str, Any] = {}
    original = app._place

    def recording(*args: Any) -> Any:
        deployment = original(*args)
        placed[deployment.name] = deployment
        return deployment

    monkeypatch.setattr(app, "_place", recording)
    app.build(AppConfig.model_validate(config))
    return placed


@pytest.mark.parametrize(
    ("config", "gpus", "shares"),
    [
        pytest.param({}, 0, (0, 0), id="no GPU: none is asked for"),
        pytest.param({}, 1, (0.3, 0.7), id="one GPU: encoder and generator share it"),
        pytest.param({}, 4, (1, 1), id="several GPUs: a whole one for each replica"),
        pytest.param({"device": "cpu"}, 4, (0, 0), id="a CPU wanted on a cluster with GPUs"),
        pytest.param({"device": "cuda"}, 0, (1, 1), id="GPUs wanted that are yet to be added"),
        pytest.param(
            {"encoder": {"num_gpus": 0.5}, "generator": {"num_gpus": 2}},
            4,
            (0.5, 2),
            id="the configuration's own numbers win",
        ),
    ],
)
def test_gpus_are_shared_out(
    config: dict[str, Any], gpus: int, shares: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    placed = placements(config, gpus, monkeypatch)
    asked = [placed[name].ray_actor_options["num_gpus"] for name in ("Encoder", "Generator")]
    assert tuple(asked) == shares
    assert placed["Preprocessor"].ray_actor_options["num_gpus"] == 0


@pytest.mark.parametrize(
    ("config", "gpus", "surge"),
    [
        pytest.param({}, 0, [100] * 4, id="CPUs"),
        pytest.param({}, 4, [100] * 4, id="several GPUs"),
        pytest.param({}, 1, [100, 100, 0, 0], id="one GPU has no room"),
        pytest.param(
            {stage: {"num_gpus": 0.2} for stage in ("encoder", "generator")},
            1,
            [100] * 4,
            id="one GPU with room",
        ),
        pytest.param({"generator": {"max_surge_percent": 50}}, 4, [100, 100, 100, 50], id="set"),
    ],
)
def test_changes_start_new_replicas_first_where_there_is_room(
    config: dict[str, Any], gpus: int, surge: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    placed = placements(config, gpus, monkeypatch)
    names = ("Ingress", "Preprocessor", "Encoder", "Generator")
    assert [placed[name]._deployment_config.max_surge_percent for name in names] == surge


def test_the_default_replicas_fit_one_core_together(monkeypatch: pytest.MonkeyPatch) -> None:
    placed = placements({}, 0, monkeypatch)
    assert set(placed) == {"Ingress", "Preprocessor", "Encoder", "Generator"}
    assert sum(d.ray_actor_options["num_cpus"] for d in placed.values()) <= 1


def test_each_stage_takes_replicas_or_autoscaling_and_resources_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = {
        "preprocessor": {"num_replicas": 3, "resources": {"decode": 1}},
        "generator": {"autoscaling": {"min_replicas": 1, "max_replicas": 4}},
    }
    placed = placements(config, 0, monkeypatch)
    assert placed["Preprocessor"].num_replicas == 3
    assert placed["Preprocessor"].ray_actor_options["resources"] == {"decode": 1}
    assert placed["Encoder"].num_replicas == 1
    scaling = placed["Generator"]._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 4)


def scaling_of(stage: str, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns Ray Serve's AutoscalingConfig of a stage that has these values."""
    placed = placements({stage: values}, 0, monkeypatch)
    return placed[stage.capitalize()]._deployment_config.autoscaling_config


@pytest.mark.parametrize("stage", ["ingress", "preprocessor", "encoder", "generator"])
def test_autoscaling_without_its_own_policy_uses_ours(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"autoscaling": {"max_replicas": 4}, "scaling": {"backlog_drain_s": 3}}
    scaling = scaling_of(stage, values, monkeypatch)

    policy = _resolve_policy_callable(scaling.policy)  # as Serve's controller does
    assert type(policy).__name__ == "StagePolicy"
    assert scaling.policy.policy_kwargs["backlog_drain_s"] == 3
    assert scaling.look_back_period_s == AUTOSCALING_DEFAULTS["look_back_period_s"]
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 4)


def test_delays_and_bounds_can_be_chosen_with_our_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"autoscaling": {"min_replicas": 0, "downscale_delay_s": 7, "max_replicas": 2}}
    scaling = scaling_of("encoder", values, monkeypatch)

    assert (scaling.min_replicas, scaling.downscale_delay_s) == (0, 7)
    assert not scaling.policy.is_default_policy_function()


def test_the_operators_own_policy_and_its_delays_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = {"policy_function": "ray.serve.autoscaling_policy:default_autoscaling_policy"}
    scaling = scaling_of("encoder", {"autoscaling": {"policy": own}}, monkeypatch)

    assert scaling.policy.policy_function == own["policy_function"]
    assert scaling.upscale_delay_s == AutoscalingConfig().upscale_delay_s


def test_serves_controller_can_run_our_policy_without_this_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray Serve pickles the policy's module by value, as its controller may run elsewhere."""
    values = {"autoscaling": {"max_replicas": 4}}
    policy = scaling_of("generator", values, monkeypatch).policy
    code = f"""
import sys
sys.modules["blip2_serve"] = None  # importing it fails
from types import SimpleNamespace
from ray import cloudpickle
policy = cloudpickle.loads({policy.get_serialized_policy_def()!r})(**{policy.policy_kwargs!r})
ctx = SimpleNamespace(
    aggregated_metrics={{"finished": {{"a": 7.0}}, "capacity": {{"a": 1.0}}}},
    running_replicas=["a"], current_num_replicas=1, target_num_replicas=1,
    total_num_requests=1.0, total_queued_requests=0.0,
    capacity_adjusted_min_replicas=1, capacity_adjusted_max_replicas=50,
    current_time=0.0, config=SimpleNamespace(metrics_interval_s=2),
)
print(policy(ctx)[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
    )
    target = GeneratorConfig().scaling.target_utilization
    assert int(done.stdout) == math.ceil(7 / target)


COMPILES_FOR_512_SHAPES = """
import psutil, torch
from blip2_serve.compute.cpu.linear import OneDnnLinear
layer = OneDnnLinear(torch.randn(512, 128).bfloat16(), None)
rows = torch.zeros(512, 128, dtype=torch.bfloat16)
layer(rows)
before = psutil.Process().memory_full_info().uss
for count in range(1, 513):
    layer(rows[:count])
print((psutil.Process().memory_full_info().uss - before) // 1_000_000)
"""


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="bfloat16 is not computed by oneDNN"
)
def test_a_replica_keeps_little_of_what_is_compiled_for_each_number_of_rows() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPILES_FOR_512_SHAPES],
        env=os.environ | environment.REPLICA,
        stdout=subprocess.PIPE,
        check=True,
    )
    assert int(done.stdout) < 150  # megabytes; of all 512 they are 350


def test_a_stage_that_is_removed_finishes_its_requests_and_does_not_linger(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    placed = placements({"request_timeout_s": 300}, 0, monkeypatch)
    for name in ("Ingress", "Preprocessor", "Encoder", "Generator"):
        config = placed[name]._deployment_config
        assert config.graceful_shutdown_timeout_s > 300
        assert config.graceful_shutdown_wait_loop_s <= 1
