"""The configuration: frozen, checked, one model per application. Unknown keys are errors.

Values come from `blip2-serve up`, from `serve run ... key=value`, or from `args` in a Serve config
file. What is discovered at start (memory, cores) is returned by its discoverer and never written
back here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from blip2_serve.ingress_config import IngressConfig
from blip2_serve.model.source import DEMO
from blip2_serve.stage_config import (
    HOW_IT_SCALES,
    ComputeConfig,
    FrozenConfig,
    InitialOngoingRequests,
    NumCpus,
    ScalingConfig,
    StageConfig,
)

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LogFormat = Literal["text", "json"]


class PreprocessorConfig(StageConfig):
    """The stage that decodes and resizes images."""

    num_cpus: NumCpus = 0.2
    threads: int = Field(
        2,
        ge=1,
        description="Images that one replica decodes at once, each in a process of its own.",
    )
    max_pixels: int = Field(
        40_000_000,
        ge=1,
        description="Most pixels of an image, width times height; larger ones are refused.",
    )
    decode_timeout_s: float = Field(
        5.0,
        gt=0,
        description="CPU seconds that decoding one image may use; the wall-clock limit is four "
        "times that, since the machine may be busy. An image that exceeds either is refused.",
    )
    decode_memory_mb: int = Field(
        1280,
        ge=128,
        description="Memory in MiB that decoding one image may take, beside the 40 MiB of its "
        "process. An image that takes more is refused.",
    )


class EncoderScaling(ScalingConfig):
    initial_ongoing_requests: InitialOngoingRequests = 8.0


class EncoderConfig(ComputeConfig):
    """The stage that computes image features."""

    scaling: EncoderScaling = Field(EncoderScaling(), description=HOW_IT_SCALES)
    num_cpus: NumCpus = 0.3
    max_batch_size: int = Field(8, ge=1, description="Most images in one forward pass.")
    quantize: Literal["fp8"] | None = Field(
        None,
        description="Quantization of the ViT's linear layers, weights and activations: fp8, which "
        "needs a GPU of compute capability 8.9 or higher (Ada, Hopper or later), or null for none.",
    )


class GeneratorScaling(ScalingConfig):
    initial_ongoing_requests: InitialOngoingRequests = 32.0


class GeneratorConfig(ComputeConfig):
    """The stage that generates answers."""

    scaling: GeneratorScaling = Field(GeneratorScaling(), description=HOW_IT_SCALES)
    num_cpus: NumCpus = 0.4
    default_max_tokens: int = Field(
        64, ge=1, description="Most tokens of an answer if the request sets no limit."
    )
    max_num_seqs: int = Field(
        64,
        ge=1,
        description="Sequences that one replica generates at once. A request has one for each of "
        "its answers or beams.",
    )
    max_waiting: int = Field(
        256,
        ge=1,
        description="Requests (not sequences) that may wait in one replica while max_num_seqs "
        "sequences run; more are refused with status 429.",
    )
    max_num_batched_tokens: int = Field(
        512,
        ge=2,
        description="Most tokens computed in one engine step, decode and prefill together. Must be "
        "above max_num_seqs.",
    )
    kv_slots: int | None = Field(
        None,
        ge=1,
        description="Tokens whose keys and values one replica can hold. Default: enough for "
        "max_num_seqs sequences of max_model_len tokens (on a CPU, of at most 512 tokens), as far "
        "as kv_memory_fraction allows.",
    )
    kv_memory_fraction: float = Field(
        0.3,
        gt=0,
        le=1,
        description="Most of the memory that is free after loading the model, as a share, that "
        "keys and values may take. Has no effect if kv_slots is set.",
    )
    stream_events_per_s: float = Field(
        500,
        gt=0,
        description="Most events per second that one replica sends, of all streams together. At "
        "this limit, an event carries several tokens. Each event costs about a millisecond of CPU "
        "time.",
    )
    prefix_caching: bool = Field(
        True,
        description="Cache the keys and values of requests for later ones that begin with the same "
        "image and tokens.",
    )
    quantize: Literal["int8"] | None = Field(
        None,
        description="Quantization of the language model's weights: int8, which needs a CPU with "
        "AVX512-VNNI, or null for none.",
    )

    @model_validator(mode="after")
    def _prompts_get_a_share_of_each_step(self) -> Self:
        if self.max_num_batched_tokens <= self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens must be above max_num_seqs ({self.max_num_seqs}): a "
                "step decodes one token per running sequence and needs room for prefill as well"
            )
        return self


class AppConfig(FrozenConfig):
    """The whole application: what `blip2_serve.app:build` takes."""

    model: str = Field(
        DEMO,
        description='Checkpoint to serve: a folder, a Hugging Face hub id, or "demo" for the '
        "shipped one.",
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit to download if model is a hub id."
    )
    served_model_name: str | None = Field(
        None, description="Model name that clients see. Default: the hub id or the folder's name."
    )
    device: Device = Field(
        "auto", description="Where the model runs; auto: on GPUs if there are any, else on CPUs."
    )
    dtype: Dtype = Field(
        "auto",
        description="Data type of weights and activations; auto: float32 on a CPU, and on a GPU "
        "that of the checkpoint (bfloat16 if that is float32).",
    )
    log_format: LogFormat = Field("text", description="Format of the replicas' log lines.")
    max_model_len: int | None = Field(
        None,
        ge=1,
        description="Most tokens of image, prompt and answer together. Default: as many as the "
        "model has positions.",
    )
    request_timeout_s: float = Field(
        120,
        gt=0,
        description="Most seconds that a request may take. A client may ask for less by the header "
        "x-request-timeout-seconds.",
    )
    shutdown_grace_s: float = Field(
        30,
        ge=0,
        description="Seconds that requests under way may go on after `up` is told to stop.",
    )
    ingress: IngressConfig = Field(IngressConfig(), description=IngressConfig.__doc__)
    preprocessor: PreprocessorConfig = Field(
        PreprocessorConfig(), description=PreprocessorConfig.__doc__
    )
    encoder: EncoderConfig = Field(EncoderConfig(), description=EncoderConfig.__doc__)
    generator: GeneratorConfig = Field(GeneratorConfig(), description=GeneratorConfig.__doc__)

    @property
    def model_name(self) -> str:
        """The name clients see: as given, else the hub id or the folder's name."""
        if self.served_model_name:
            return self.served_model_name
        path = Path(self.model).expanduser()
        return path.resolve().name if path.is_dir() else self.model
