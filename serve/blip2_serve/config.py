"""The configuration: frozen, checked, one model per application. Unknown keys are errors.

Values come from `blip2-serve up`, from `serve run ... key=value`, or from `args` in a Serve config
file. What is discovered at start (memory, cores) is returned by its discoverer and never written
back here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from blip2_serve.model.source import DEMO

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LogFormat = Literal["text", "json"]

# Fields whose default differs from stage to stage.
NumCpus = Annotated[float, Field(ge=0, description="CPU cores that Ray reserves for each replica.")]
InitialOngoingRequests = Annotated[
    float,
    Field(
        gt=0,
        description="Target for ongoing requests per replica while no replica has measured its "
        "capacity (ingress replicas never do). Ray Serve's target_ongoing_requests has no effect.",
    ),
]

# A web page's origin as browsers send it: without a path, and without a slash at its end.
Origin = Annotated[str, Field(pattern=r"^(\*|null|[a-z][a-z0-9+.-]*://[^/?#\s*]+)$")]

HOW_IT_SCALES = "How this package's autoscaling policy chooses the number of replicas."


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


# Ray Serve's keys for a stage that scales by this package's policy, unless `autoscaling` sets them.
# Ray Serve's own delays are for a policy that overshoots. `look_back_period_s` must be above
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
    """Settings of the policy in `scaling.py`. Bounds and delays are Ray Serve's, in `autoscaling`.

    The defaults come from simulations (`loadtest/README.md`).
    """

    target_utilization: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Target share of a replica's measured capacity that the offered load may use.",
    )
    headroom: float = Field(
        0.62,
        ge=0,
        description="Factor for the spare replicas, which allow for growth of the load while new "
        "replicas start: headroom times the square root of (replicas that the load fills times "
        "seconds that a replica takes to start).",
    )
    burst_headroom: float = Field(
        1.4,
        ge=1,
        description="Factor by which the headroom grows if the load has risen sharply at least "
        "twice in the last 8 minutes.",
    )
    backlog_drain_s: float = Field(
        0.3, gt=0, description="Seconds within which a backlog should be worked off."
    )
    max_surge: float = Field(
        5.0,
        ge=1,
        description="Most replicas that a backlog may ask for, as a multiple of those that the "
        "load alone fills.",
    )
    downscale_margin: float = Field(
        0.1,
        ge=0,
        description="Share by which the remaining replicas must exceed the need before any replica "
        "is stopped.",
    )
    target_occupancy: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Target share of a generator replica's places in use: of max_num_seqs and of "
        "its KV slots.",
    )
    max_step_s: float | None = Field(
        0.1,
        gt=0,
        description="Longest time between two tokens of an answer to aim at, in seconds (an engine "
        "step of a generator replica); null: any.",
    )
    initial_ongoing_requests: InitialOngoingRequests = 4.0


class StageConfig(_Config):
    """Replicas of one stage, and what each of them gets.

    By default all stages together fit one CPU core; clusters should reserve real resources.
    """

    num_replicas: int = Field(1, ge=1, description="Number of replicas, unless autoscaling is set.")
    autoscaling: dict[str, Any] | None = Field(
        None,
        description="Ray Serve's autoscaling_config, used instead of num_replicas. Unless it has a "
        "policy of its own, the stage scales by the settings in scaling. With min_replicas: 0, an "
        "idle stage has no replicas.",
    )
    scaling: ScalingConfig = Field(ScalingConfig(), description=HOW_IT_SCALES)
    num_cpus: NumCpus = 0.1
    resources: dict[str, float] = Field(
        {},
        description="Custom Ray resources that each replica reserves, as amounts by name. They "
        "place a stage on nodes that have them.",
    )
    max_surge_percent: int = Field(
        100,
        ge=0,
        le=100,
        description="Most new replicas, as a percentage of the stage's number, that start before "
        "old ones stop while a running application is changed. If there is no room for any, the "
        "change waits; 0 stops an old one first. Always 0 where encoder and generator share a "
        "cluster's only GPU by default.",
    )
    max_ongoing_requests: int = Field(
        256, ge=1, description="Requests that one replica may have at once; others wait at callers."
    )
    max_queued_requests: int = Field(
        1024,
        ge=1,
        description="Requests that may wait for a replica at each caller (an HTTP proxy or an "
        "ingress replica); more are refused with status 503.",
    )

    @property
    def may_be_at_zero(self) -> bool:
        """Whether it may have no replicas while it is idle."""
        return self.autoscaling is not None and self.autoscaling.get("min_replicas") == 0

    @property
    def autoscaling_config(self) -> dict[str, Any] | None:
        """Ray Serve's, with this package's policy unless it has another; None: no autoscaling."""
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
        description="GPUs that Ray reserves for each replica. Default: none on a CPU; a share of "
        "the GPU if the cluster has exactly one; else a whole GPU.",
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads that torch uses in each replica. Default: all cores that the "
        "replica may use.",
    )


class ImageLimits(_Config):
    """Images that clients may send."""

    max_bytes: int = Field(20 << 20, ge=1, description="Largest size of an image file, in bytes.")
    allow_urls: bool = Field(
        False,
        description="Fetch images from https URLs that clients send. Any client can then make the "
        "server fetch any address that it can reach.",
    )
    url_timeout_s: float = Field(
        10.0,
        gt=0,
        description="Seconds that fetching an image may take, including the wait for other "
        "downloads.",
    )
    max_downloads: int = Field(
        16, ge=1, description="Images that one ingress replica may download at once."
    )


# What evaluation tools put after a question, for models that answer in sentences.
VQA_INSTRUCTIONS = (
    "Answer the question using a single word or phrase.",
    "Answer the question with a single word or phrase.",
    "Answer the question using a single word.",
    "Answer the question with a single word.",
    "Answer the question with a short phrase.",
    "Answer the question with yes or no.",
    "Answer the question briefly.",
    "Answer using a single word or phrase.",
    "Answer with a single word or phrase.",
    "Answer in a single word or phrase.",
    "Answer with a single word.",
    "Answer in one word.",
    "Answer with yes or no.",
    "Answer yes or no.",
    "Answer briefly.",
    "Give a short answer.",
    "Directly provide a short answer to the question.",
    "When the provided information is insufficient, respond with 'Unanswerable'.",
    "Short answer:",
    "Answer:",
)


class ChatConfig(_Config):
    """How chat turns become a prompt: `str.format` templates, by default those of LAVIS."""

    answered: str = Field(
        "Question: {question} Answer: {answer}. ",
        description="Template of an earlier turn: a {question} and its {answer}.",
    )
    asked: str = Field(
        "Question: {question} Answer:", description="Template of the last {question}."
    )
    asked_short: str = Field(
        "Question: {question} Short answer:",
        description='Template of the last {question} in a request with preset "vqa".',
    )
    captioned: str = Field(
        "{answer}. ",
        description="Template of an earlier turn without a question: an image and its {answer}.",
    )
    preamble: str = Field(
        "{text} ",
        description="Template of the {text} of a system or developer message, which comes first.",
    )
    vqa_instructions: tuple[str, ...] = Field(
        VQA_INSTRUCTIONS,
        description="Instructions that are dropped from the end of a question to NAME:vqa.",
    )


class AdmissionConfig(_Config):
    """Which requests an ingress replica takes on, and which it refuses with status 429."""

    max_wait_s: float = Field(
        2.0,
        gt=0,
        description="Seconds within which the work that was admitted before a request must be done "
        "for the request to be admitted, by what the stages can do.",
    )
    min_requests: int = Field(
        8, ge=1, description="Requests under way below which every further one is admitted."
    )
    initial_requests: int = Field(
        32,
        ge=1,
        description="Most requests under way while nobody knows what the stages can do: at the "
        "start, or while a stage has no replica.",
    )
    max_held_bytes: int = Field(
        512 << 20,
        ge=1,
        description="Most bytes that the bodies of all requests under way may have.",
    )
    max_total_tokens: int = Field(
        32768,
        ge=1,
        description="Most tokens that one request may ask for: n or num_beams, times max_tokens.",
    )
    body_timeout_s: float = Field(
        30.0, gt=0, description="Seconds within which a request's body must arrive."
    )
    max_slow_bodies: int = Field(
        1024,
        ge=0,
        description="Most requests whose bodies are still arriving after a quarter of a second; "
        "further ones are refused. They do not count as requests under way.",
    )


class IngressScaling(ScalingConfig):
    """The ingress does not measure its capacity, so its ongoing requests decide."""

    initial_ongoing_requests: InitialOngoingRequests = 64.0


class IngressConfig(StageConfig):
    """The stage that speaks HTTP."""

    max_ongoing_requests: int = Field(
        4096,
        ge=1,
        description="Connections with a request that one replica may have at once. Far more than "
        "`admission` lets in: a request that is refused is one of them until it is answered.",
    )
    scaling: IngressScaling = Field(IngressScaling(), description=HOW_IT_SCALES)
    images: ImageLimits = Field(ImageLimits(), description=ImageLimits.__doc__)
    chat: ChatConfig = Field(ChatConfig(), description=ChatConfig.__doc__)
    max_body_bytes: int = Field(
        64 << 20, ge=1, description="Largest size of a request's body, in bytes."
    )
    admission: AdmissionConfig = Field(AdmissionConfig(), description=AdmissionConfig.__doc__)
    cors_origins: tuple[Origin, ...] = Field(
        (),
        description="Origins whose web pages may call the server from a browser, such as "
        '"https://app.example.com"; "*" is any. Default: none.',
    )
    feature_cache_entries: int = Field(
        512,
        ge=0,
        description="Images whose features one replica caches; 0: none, but requests for the same "
        "image at the same time still share its encoding.",
    )


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
        description="Seconds of CPU time that decoding one image may take. By the clock it may "
        "take four times as long, since the machine may be busy. An image that takes longer is "
        "refused.",
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


class AppConfig(_Config):
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
