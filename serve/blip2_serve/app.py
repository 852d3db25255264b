"""The composition graph: three stages behind one ingress, each scaled by itself."""

# No `from __future__ import annotations`: Serve reads build's annotation as a class.
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from blip2_serve.config import AppConfig, ComputeConfig, StageConfig
from blip2_serve.deployments.encoder import Encoder
from blip2_serve.deployments.generator import Generator
from blip2_serve.deployments.ingress import Ingress
from blip2_serve.deployments.preprocessor import Preprocessor
from blip2_serve.errors import StartupError

# How two stages share one GPU; the language model is the larger by far.
ENCODER_GPU_SHARE, GENERATOR_GPU_SHARE = 0.3, 0.7

# Threads that spin while they wait for each other take the cores from other replicas: two torch
# processes on two cores then slow each other several times over.
REPLICA_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}


def build(config: AppConfig) -> Application:
    """The application of a configuration, for `serve.run`, `serve run` and `serve deploy`."""
    gpus = cluster_gpus()
    device = resolve_device(config.device, gpus)
    encoder_gpu, generator_gpu = (
        (0.0, 0.0)
        if device == "cpu"
        else (1.0, 1.0)
        if gpus >= 2
        else (ENCODER_GPU_SHARE, GENERATOR_GPU_SHARE)
    )

    preprocessor = _place(Preprocessor, config.preprocessor).bind(config)
    encoder = _place(Encoder, config.encoder, encoder_gpu).bind(config, device)
    generator = _place(Generator, config.generator, generator_gpu).bind(config, device)
    return _place(Ingress, config.ingress).bind(config, preprocessor, encoder, generator)


def cluster_gpus() -> float:
    return ray.cluster_resources().get("GPU", 0.0) if ray.is_initialized() else 0.0


def resolve_device(device: str, gpus: float) -> str:
    """ "auto" is the GPU where the cluster has one.

    Raises:
        StartupError: a GPU is asked for and there is none.
    """
    if device == "auto":
        return "cuda" if gpus else "cpu"
    if device == "cuda" and not gpus:
        raise StartupError(
            "no CUDA device in this Ray cluster: use --device cpu, or add a GPU node"
        )
    return device


def _place(deployment: Any, stage: StageConfig, gpu_share: float = 0.0) -> serve.Deployment:
    """The deployment with its replicas, limits and resources."""
    asked = stage.num_gpus if isinstance(stage, ComputeConfig) else None
    scaling = (
        {"autoscaling_config": stage.autoscaling}
        if stage.autoscaling
        else {"num_replicas": stage.num_replicas}
    )
    placed: serve.Deployment = deployment.options(
        **scaling,
        max_ongoing_requests=stage.max_ongoing_requests,
        max_queued_requests=stage.max_queued_requests,
        ray_actor_options={
            "num_cpus": stage.num_cpus,
            "num_gpus": gpu_share if asked is None else asked,
            "resources": stage.resources,
            "runtime_env": {"env_vars": REPLICA_ENVIRONMENT},
        },
    )
    return placed
