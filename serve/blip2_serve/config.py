"""The configuration: frozen, checked, one model per deployment. Unknown keys are errors.

Values come from the command line, from `serve run ... key=value` or from a Serve config file's
`args`. What is discovered at start (memory, threads) is returned by whoever discovers it and never
written back here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from blip2_serve.model.source import DEMO

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LogFormat = Literal["text", "json"]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


# Serve's keys for stages that scale by this package's policy, where `autoscaling` does not say
# otherwise. Serve's own delays are for a policy that overshoots. `look_back_period_s` must be above
# `metrics_interval_s`.
AUTOSCALING_DEFAULTS: Mapping[str, float] = MappingProxyType(
    {
        "metrics_interval_s": 2,
        "look_back_period_s": 2.5,
        "upscale_delay_s": 0,
        "downscale_delay_s": 10,
        "downscale_to_zero_delay_s": 600,  # only where min_replicas is 0
    }
)


class ScalingConfig(_Config):
    """The policy in `autoscaling.py`. Bounds and delays are Serve's own keys, in `autoscaling`.

    The defaults come from simulations (`loadtest/README.md`).
    """

    target_utilization: float = Field(
        0.9, gt=0, le=1, description="of what replicas can do: the offered load that they get"
    )
    headroom: float = Field(
        0.62,
        ge=0,
        description="replicas on top of those: this, times the square roots of the replicas that "
        "the load fills and of the seconds that one takes to start",
    )
    burst_headroom: float = Field(
        1.4, ge=1, description="times the headroom, while the load has risen twice in 8 minutes"
    )
    backlog_drain_s: float = Field(0.3, gt=0, description="in which a backlog is to be worked off")
    max_surge: float = Field(
        5.0,
        ge=1,
        description="times the replicas that the load alone would fill: what a backlog may ask for",
    )
    downscale_margin: float = Field(
        0.1,
        ge=0,
        description="share by which the replicas that remain must be more than enough before "
        "any is stopped",
    )
    target_occupancy: float = Field(
        0.9, gt=0, le=1, description="of a generator's places: sequences at once, and KV rows"
    )
    max_step_s: float | None = Field(
        0.1, gt=0, description="of a generator: the time between two tokens; null: any"
    )
    initial_ongoing_requests: float = Field(
        4.0,
        gt=0,
        description="per replica, while no replica has measured what it can do; Serve's "
        "target_ongoing_requests has no effect",
    )


class StageConfig(_Config):
    """Replicas of one deployment, and what each of them gets.

    The defaults of all stages together fit one CPU core; real resources are for clusters.
    """

    num_replicas: int = Field(1, ge=1)
    autoscaling: dict[str, Any] | None = Field(
        None,
        description="Ray Serve's autoscaling_config, instead of num_replicas; with a `policy` of "
        "its own, or by `scaling`. min_replicas: 0 lets an idle stage go",
    )
    scaling: ScalingConfig = ScalingConfig()
    num_cpus: float = Field(0.1, ge=0)
    resources: dict[str, float] = {}
    max_ongoing_requests: int = Field(256, ge=1, description="per replica")
    max_queued_requests: int = Field(1024, ge=1, description="per caller, beyond the ongoing ones")

    @property
    def autoscaling_config(self) -> dict[str, Any] | None:
        """Serve's, with this package's policy unless there is another; None: no autoscaling."""
        if not self.autoscaling or "policy" in self.autoscaling:
            return self.autoscaling or None
        policy = {
            "policy_function": "blip2_serve.scaling:StagePolicy",
            "policy_kwargs": self.scaling.model_dump(),
        }
        return {**AUTOSCALING_DEFAULTS, **self.autoscaling, "policy": policy}


class ComputeConfig(StageConfig):
    """A stage that runs a part of the model."""

    num_gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs per replica; by default none on a CPU, a whole one each where the "
        "cluster has two, and a share of the one it has otherwise",
    )
    threads: int | None = Field(None, ge=1, description="torch's threads; by default all cores")


class ImageLimits(_Config):
    max_bytes: int = Field(20 << 20, ge=1, description="of one image file")
    allow_urls: bool = Field(False, description="fetch https image URLs")
    url_timeout_s: float = Field(
        10.0, gt=0, description="for an image: waiting for its turn, and the download"
    )
    max_downloads: int = Field(16, ge=1, description="images downloaded at once, per replica")


class ChatConfig(_Config):
    """How chat turns become a prompt (`str.format` templates), as LAVIS writes them."""

    answered: str = "Question: {question} Answer: {answer}. "
    asked: str = "Question: {question} Answer:"
    asked_short: str = Field(
        "Question: {question} Short answer:", description='the last question, with preset "vqa"'
    )
    captioned: str = Field("{answer}. ", description="an answer to an image without a question")
    preamble: str = Field("{text} ", description="system and developer messages, put first")


class IngressScaling(ScalingConfig):
    """It measures nothing of its own: what is ongoing decides."""

    initial_ongoing_requests: float = Field(64.0, gt=0)


class IngressConfig(StageConfig):
    scaling: IngressScaling = IngressScaling()
    images: ImageLimits = ImageLimits()
    chat: ChatConfig = ChatConfig()
    max_body_bytes: int = Field(64 << 20, ge=1, description="of one request")
    feature_cache_entries: int = Field(512, ge=0, description="image prefixes kept per replica")


class PreprocessorConfig(StageConfig):
    num_cpus: float = Field(0.2, ge=0)
    threads: int = Field(2, ge=1, description="images decoded at once in one replica")


class EncoderScaling(ScalingConfig):
    initial_ongoing_requests: float = Field(8.0, gt=0)


class EncoderConfig(ComputeConfig):
    scaling: EncoderScaling = EncoderScaling()
    num_cpus: float = Field(0.3, ge=0)
    max_batch_size: int = Field(8, ge=1, description="images of one forward pass")


class GeneratorScaling(ScalingConfig):
    initial_ongoing_requests: float = Field(32.0, gt=0)


class GeneratorConfig(ComputeConfig):
    scaling: GeneratorScaling = GeneratorScaling()
    num_cpus: float = Field(0.4, ge=0)
    default_max_tokens: int = Field(64, ge=1, description="for requests that name no limit")
    max_num_seqs: int = Field(64, ge=1, description="sequences generated at once")
    max_waiting: int = Field(256, ge=1, description="sequences queued beyond that")
    max_num_batched_tokens: int = Field(512, ge=2, description="tokens computed in one engine step")
    kv_slots: int | None = Field(
        None,
        ge=1,
        description="tokens whose keys and values fit; by default enough for max_num_seqs "
        "sequences of full length (on a CPU, of up to 512 tokens), as far as memory allows",
    )
    kv_memory_fraction: float = Field(
        0.3, gt=0, le=1, description="of the memory that is free after loading, for the KV"
    )

    stream_events_per_s: float = Field(
        500,
        gt=0,
        description="of all streams of a replica together; beyond that, a stream's tokens wait for "
        "each other, since an event costs a millisecond of CPU time",
    )
    prefix_caching: bool = Field(
        True, description="keep keys and values of requests for later ones that begin the same"
    )
    quantize: Literal["int8"] | None = Field(
        None, description="the language model's weights; on x86 CPUs only"
    )

    @model_validator(mode="after")
    def _prompts_get_a_share_of_each_step(self) -> Self:
        if self.max_num_batched_tokens <= self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens must be above max_num_seqs ({self.max_num_seqs}): a "
                "step decodes one token per running sequence and needs room for prefill as well"
            )
        return self


class AppConfig(_Config):
    """The whole application: what `blip2_serve.app:build` takes."""

    model: str = Field(DEMO, description='folder, hub id, or "demo" for the shipped checkpoint')
    revision: str | None = Field(None, description="of a hub id")
    served_model_name: str | None = None
    device: Device = "auto"
    dtype: Dtype = Field("auto", description="float32 on a CPU, the checkpoint's on a GPU")
    log_format: LogFormat = Field("text", description="of the replicas' log lines")
    max_model_len: int | None = Field(
        None, ge=1, description="image, prompt and answer tokens; by default the model's positions"
    )
    ingress: IngressConfig = IngressConfig()
    preprocessor: PreprocessorConfig = PreprocessorConfig()
    encoder: EncoderConfig = EncoderConfig()
    generator: GeneratorConfig = GeneratorConfig()

    @property
    def model_name(self) -> str:
        """The name clients see: as given, else the hub id or the folder's name."""
        if self.served_model_name:
            return self.served_model_name
        path = Path(self.model).expanduser()
        return path.resolve().name if path.is_dir() else self.model
