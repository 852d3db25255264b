"""The composition graph: three stages behind one ingress, each scaled by itself."""

# No `from __future__ import annotations`: Serve reads build's annotation as a class.
from typing import Any

import ray
import torch
from ray import serve
from ray.serve import Application

from blip2_serve import environment
from blip2_serve.config import AppConfig, ComputeConfig, StageConfig
from blip2_serve.stages.encoder import Encoder
from blip2_serve.stages.generator import Generator
from blip2_serve.stages.ingress import Ingress
from blip2_serve.stages.preprocessor import Preprocessor

# How encoder and generator share one GPU; the language model is the larger by far.
GPU_SHARES = (0.3, 0.7)


def build(config: AppConfig) -> Application:
    """The application of a configuration, for `serve.run`, `serve run` and `serve deploy`."""
    gpus = visible_gpus()
    device = ("cuda" if gpus else "cpu") if config.device == "auto" else config.device
    # With none to be seen yet (an autoscaled cluster), each replica asks for a whole one.
    encoder_gpu, generator_gpu = (0, 0) if device == "cpu" else GPU_SHARES if gpus == 1 else (1, 1)

    preprocessor = _place(Preprocessor, config.preprocessor).bind(config)
    encoder = _place(Encoder, config.encoder, encoder_gpu).bind(config, device)
    generator = _place(Generator, config.generator, generator_gpu).bind(config, device)
    return _place(Ingress, config.ingress).bind(config, preprocessor, encoder, generator)


def visible_gpus() -> float:
    """GPUs of the cluster or, since `serve run` builds before it connects, of this machine."""
    if ray.is_initialized():
        return float(ray.cluster_resources().get("GPU", 0))
    return torch.cuda.device_count()


def _place(deployment: Any, stage: StageConfig, gpu_share: float = 0.0) -> serve.Deployment:
    """The deployment with its replicas, limits and resources."""
    asked = stage.num_gpus if isinstance(stage, ComputeConfig) else None
    scaling = (
        {"autoscaling_config": stage.autoscaling_config}
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
            "runtime_env": {"env_vars": environment.REPLICA},
        },
    )
    return placed
