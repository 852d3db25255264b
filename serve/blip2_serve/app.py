"""The Ray Serve application: three stages behind one ingress, each scaled by itself."""

# No `from __future__ import annotations`: Ray Serve needs the annotation of `build` as a class.

from typing import Any

import ray
import torch
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from blip2_serve import environment
from blip2_serve.config import AppConfig
from blip2_serve.stage_config import ComputeConfig, StageConfig
from blip2_serve.stages.encoder import Encoder
from blip2_serve.stages.generator import Generator
from blip2_serve.stages.ingress import Ingress
from blip2_serve.stages.preprocessor import Preprocessor
from blip2_serve.stages.router import CallRouter

# A replica that has stalled is replaced after about as many seconds as both together.
HEALTH_CHECK_PERIOD_S, HEALTH_CHECK_TIMEOUT_S = 1.0, 4.0

CALL_ROUTER = RequestRouterConfig.model_validate({"request_router_class": CallRouter})

# How encoder and generator share a cluster's only GPU; the language model is by far the larger.
GPU_SHARES = (0.3, 0.7)

# A replica that is removed finishes its requests first. They get their own time limit, plus this.
SHUTDOWN_MARGIN_S = 10
# How often such a replica looks whether it has finished; Ray Serve's default is 2.
SHUTDOWN_POLL_S = 0.5


def build(config: AppConfig) -> Application:
    """Builds the application, for `serve.run`, `serve run` and `serve deploy`."""
    gpus = visible_gpus()
    device = config.device
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    encoder_gpu, generator_gpu = _gpus_per_replica(device, gpus)

    time_s = config.request_timeout_s
    preprocessor = _place(Preprocessor, config.preprocessor, time_s).bind(config)
    encoder = _place(Encoder, config.encoder, time_s, encoder_gpu).bind(config, device)
    generator = _place(Generator, config.generator, time_s, generator_gpu).bind(config, device)
    return _place(Ingress, config.ingress, time_s).bind(config, preprocessor, encoder, generator)


def _gpus_per_replica(device: str, gpus: float) -> tuple[float, float]:
    """GPUs for each replica of the encoder and of the generator."""
    if device == "cpu":
        return 0, 0
    # A cluster that has no GPU yet may add nodes on demand: then each replica asks for a whole one.
    return GPU_SHARES if gpus == 1 else (1, 1)


def visible_gpus() -> float:
    """Counts the GPUs of the cluster; those of this machine if Ray is not connected yet.

    `serve run` builds the application before it connects.
    """
    if ray.is_initialized():
        return float(ray.cluster_resources().get("GPU", 0))
    return torch.cuda.device_count()


def _place(
    cls: Any, stage: StageConfig, request_timeout_s: float, gpu_share: float = 0.0
) -> serve.Deployment:
    """Makes a deployment of a stage's class, with its replicas, limits and resources."""
    asked = stage.num_gpus if isinstance(stage, ComputeConfig) else None
    scaling = (
        {"autoscaling_config": stage.autoscaling_config}
        if stage.autoscaling
        else {"num_replicas": stage.num_replicas}
    )
    # Stages that fill the only GPU have no room for a new replica beside the old one.
    surge = 0 if asked is None and 0 < gpu_share < 1 else stage.max_surge_percent
    routed = {} if cls is Ingress else {"request_router_config": CALL_ROUTER}
    deployment: Any = serve.deployment(cls)
    placed: serve.Deployment = deployment.options(
        **scaling,
        **routed,
        max_surge_percent=surge,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        max_ongoing_requests=stage.max_ongoing_requests,
        max_queued_requests=stage.max_queued_requests,
        graceful_shutdown_timeout_s=request_timeout_s + SHUTDOWN_MARGIN_S,
        graceful_shutdown_wait_loop_s=SHUTDOWN_POLL_S,
        ray_actor_options={
            "num_cpus": stage.num_cpus,
            "num_gpus": gpu_share if asked is None else asked,
            "resources": stage.resources,
            "runtime_env": {"env_vars": environment.REPLICA},
        },
    )
    return placed
