"""Every metric: what it is called, what it means, its labels and its buckets. No Ray here.

Who measures is handed a `Recorder`. Ray exports the names with `ray_` in front and adds the labels
deployment, replica and application; the README's table is made from this catalogue.

Ray estimates the `_sum` of a histogram from the middles of its buckets, so each histogram has a
counter beside it with the exact one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, Protocol

logger = logging.getLogger(__name__)

P = ParamSpec("P")

EXPORT_PREFIX = "ray_"
LOG_EVERY_S = 60.0


@dataclass(frozen=True)
class Metric:
    """`name` is without what Ray puts in front."""

    name: str
    help: str
    labels: tuple[str, ...] = ()

    @property
    def exported(self) -> str:
        return EXPORT_PREFIX + self.name


@dataclass(frozen=True)
class Counter(Metric):
    pass


@dataclass(frozen=True)
class Gauge(Metric):
    pass


@dataclass(frozen=True)
class Histogram(Metric):
    buckets: tuple[float, ...] = ()

    @property
    def exact_sum(self) -> Counter:
        return Counter(
            f"{self.name}_exact_total",
            f"The exact sum of {self.exported}, whose own _sum Ray estimates.",
            self.labels,
        )


class Recorder(Protocol):
    """Takes measurements, from any thread. Labels are those of the metric, all of them."""

    def add(self, metric: Counter, value: float = 1, **labels: str) -> None:
        """Nothing happens for a `value` of 0."""

    def set(self, metric: Gauge, value: float, **labels: str) -> None: ...

    def observe(self, metric: Histogram, value: float, **labels: str) -> None:
        """Counts in the histogram, and adds to its exact sum."""


def harmless(observe: Callable[P, object]) -> Callable[P, None]:
    """`observe`, but what it raises is only logged, at most once a minute.

    A measurement that fails must never harm the work that it measures.
    """
    quiet_until = 0.0

    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        nonlocal quiet_until
        try:
            observe(*args, **kwargs)
        except Exception:
            if time.monotonic() >= quiet_until:
                quiet_until = time.monotonic() + LOG_EVERY_S
                logger.exception("a measurement failed; the work it measured is unaffected")

    return guarded


_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_BYTES = tuple(float(1 << power) for power in range(14, 27, 2))  # 16 KiB to 64 MiB

# -- what clients see ------------------------------------------------------------------------------

REQUESTS = Counter(
    "blip2_requests_total",
    "HTTP requests answered. Outcomes: ok, invalid (4xx), overloaded, unavailable (503), "
    "error (other 5xx, and streams that broke), cancelled (the client left).",
    ("route", "outcome"),
)
REQUEST_DURATION = Histogram(
    "blip2_request_duration_seconds",
    "From the request's arrival at the ingress to the end of its answer.",
    ("route",),
    _SECONDS,
)
TIME_TO_FIRST_TOKEN = Histogram(
    "blip2_time_to_first_token_seconds",
    "From the arrival of a request that streams to its first token.",
    ("route",),
    _SECONDS,
)
INTER_TOKEN_LATENCY = Histogram(
    "blip2_inter_token_latency_seconds",
    "Of streams: time from one event to the next, by the tokens of the next.",
    ("route",),
    _SHORT_SECONDS,
)
REJECTIONS = Counter(
    "blip2_rejections_total",
    "Requests that were refused although their form was right, by the error's code.",
    ("reason",),
)
IMAGE_ERRORS = Counter(
    "blip2_image_errors_total",
    "Images that could not be used. Kinds: url, base64, empty, bytes, pixels, format, broken, "
    "fetch.",
    ("kind",),
)

# -- stages ----------------------------------------------------------------------------------------

STAGE_DURATION = Histogram(
    "blip2_stage_duration_seconds",
    "A request's time in a replica of a stage, waiting included.",
    ("stage",),
    _SECONDS,
)
QUEUE_TIME = Histogram(
    "blip2_queue_time_seconds",
    "Of that, waiting: for a thread (preprocessor), a batch (encoder), KV rows (generator).",
    ("stage",),
    _SECONDS,
)
QUEUE_DEPTH = Gauge("blip2_queue_depth", "Requests that wait in a replica of a stage.", ("stage",))
DROPPED = Counter(
    "blip2_dropped_total", "Work that was dropped since its client had left.", ("stage",)
)
FEATURE_LOOKUPS = Counter(
    "blip2_feature_cache_lookups_total",
    "Images looked up by the ingress. Results: hit, joined (an encode under way), miss.",
    ("result",),
)
IMAGE_BYTES = Histogram("blip2_image_bytes", "Sizes of image files.", (), _BYTES)
IMAGE_DECODE_TIME = Histogram(
    "blip2_image_decode_seconds", "Decoding and resizing an image.", (), _SHORT_SECONDS
)
STEP_DURATION = Histogram(
    "blip2_step_duration_seconds",
    "One batch of images (encode) or one step of the engine (prefill, decode, mixed).",
    ("phase",),
    _SHORT_SECONDS,
)
BATCH_SIZE = Histogram(
    "blip2_batch_size",
    "Images of a batch (encoder), sequences of a step (generator).",
    ("stage",),
    _SIZES,
)
BATCH_CAPACITY = Counter(
    "blip2_batch_capacity_total",
    "Places that these batches and steps had. Occupancy is the batch sizes' exact sum by this.",
    ("stage",),
)

# -- generation ------------------------------------------------------------------------------------

PROMPT_TOKENS = Counter(
    "blip2_prompt_tokens_total", "Tokens of prompts that were begun, the image's included."
)
GENERATED_TOKENS = Counter("blip2_generated_tokens_total", "Tokens of answers, all of n and beams.")
CACHED_PROMPT_TOKENS = Counter(
    "blip2_cached_prompt_tokens_total",
    "Tokens of prompts whose keys and values were there already.",
)
KV_SLOTS_USED = Gauge(
    "blip2_kv_slots_used", "KV rows that are taken: by requests, or kept for later ones."
)
KV_SLOTS_CACHED = Gauge(
    "blip2_kv_slots_cached", "Of them, those of earlier requests, which go when rows are needed."
)
KV_SLOTS_CAPACITY = Gauge("blip2_kv_slots_capacity", "KV rows that there are; one holds a token.")
SEQUENCES_RUNNING = Gauge("blip2_sequences_running", "Sequences that are being generated.")

# -- replicas --------------------------------------------------------------------------------------

MODEL_LOAD_SECONDS = Gauge(
    "blip2_model_load_seconds", "Loading a stage's part of the model took so long.", ("stage",)
)
MODEL_BYTES = Gauge("blip2_model_bytes", "Its parameters as they are served.", ("stage",))
GPU_MEMORY_USED = Gauge(
    "blip2_gpu_memory_used_bytes", "Of the replica's GPU, whoever uses it.", ("stage",)
)
GPU_MEMORY_CAPACITY = Gauge("blip2_gpu_memory_capacity_bytes", "Of the replica's GPU.", ("stage",))
BUILD_INFO = Gauge(
    "blip2_build_info",
    "Always 1; the labels say what is running.",
    ("version", "model", "dtype", "device", "torch", "transformers", "ray"),
)

# Made by the page at /metrics itself, not by a replica.
NODE_UP = Gauge(
    "blip2_node_up",
    "Whether a node's metrics are on this page (1) or did not come in time (0).",
    ("node",),
)

MEASURED: tuple[Metric, ...] = (
    REQUESTS,
    REQUEST_DURATION,
    TIME_TO_FIRST_TOKEN,
    INTER_TOKEN_LATENCY,
    REJECTIONS,
    IMAGE_ERRORS,
    STAGE_DURATION,
    QUEUE_TIME,
    QUEUE_DEPTH,
    DROPPED,
    FEATURE_LOOKUPS,
    IMAGE_BYTES,
    IMAGE_DECODE_TIME,
    STEP_DURATION,
    BATCH_SIZE,
    BATCH_CAPACITY,
    PROMPT_TOKENS,
    GENERATED_TOKENS,
    CACHED_PROMPT_TOKENS,
    KV_SLOTS_USED,
    KV_SLOTS_CACHED,
    KV_SLOTS_CAPACITY,
    SEQUENCES_RUNNING,
    MODEL_LOAD_SECONDS,
    MODEL_BYTES,
    GPU_MEMORY_USED,
    GPU_MEMORY_CAPACITY,
    BUILD_INFO,
    NODE_UP,
)


def catalogue() -> list[Metric]:
    """Every metric, the exact sums of histograms behind them."""
    return [
        entry
        for metric in MEASURED
        for entry in ((metric, metric.exact_sum) if isinstance(metric, Histogram) else (metric,))
    ]


def table() -> str:
    """The catalogue in Markdown, by exported names; the README shows it."""
    lines = ["| metric | type | labels | |", "|---|---|---|---|"]
    for metric in MEASURED:
        kind = type(metric).__name__.lower()
        labels = ", ".join(metric.labels)
        name = f"`{metric.exported}`"
        if isinstance(metric, Histogram):
            name += f", `{metric.exact_sum.exported}`"
        lines.append(f"| {name} | {kind} | {labels} | {metric.help} |")
    return "\n".join(lines)
