"""The catalogue of metrics: names, help texts, labels and buckets. Needs no Ray.

Ray exports each name with `ray_` in front and adds the labels deployment, replica and application.
It estimates a histogram's `_sum` from the middles of its buckets, so each histogram has a counter
with the exact sum beside it. The table in the documentation is made from this catalogue.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, Protocol

logger = logging.getLogger(__name__)

P = ParamSpec("P")

EXPORT_PREFIX = "ray_"
LOG_INTERVAL_S = 60.0  # between log lines about one failing measurement


@dataclass(frozen=True)
class Metric:
    """A metric as Ray is given it: `name` lacks the prefix that Ray exports it with."""

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
    buckets: tuple[float, ...] = ()  # upper bounds, ascending

    @property
    def exact_sum(self) -> Counter:
        return Counter(
            f"{self.name}_exact_total",
            f"Exact sum of {self.exported}, whose _sum is an estimate.",
            self.labels,
        )


class Recorder(Protocol):
    """Takes measurements, from any thread. Give every label of the metric."""

    def add(self, metric: Counter, value: float = 1, **labels: str) -> None:
        """Adds to a counter; a `value` of 0 does nothing."""

    def set(self, metric: Gauge, value: float, **labels: str) -> None: ...

    def observe(self, metric: Histogram, value: float, **labels: str) -> None:
        """Adds to a histogram and to its exact sum."""

    def report_every_second(self, report: Callable[[], None]) -> None:
        """Calls `report` once per second in a thread, to record state rather than events."""


def harmless(measure: Callable[P, object]) -> Callable[P, None]:
    """Wraps `measure` so that what it raises is logged, at most once a minute, and goes no further.

    A measurement that fails must never harm the work it measures.
    """
    quiet_until = 0.0

    @functools.wraps(measure)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        nonlocal quiet_until
        try:
            measure(*args, **kwargs)
        except Exception:
            if time.monotonic() >= quiet_until:
                quiet_until = time.monotonic() + LOG_INTERVAL_S
                logger.exception("a measurement failed; the work it measured is unaffected")

    return guarded


_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_TOKENS = tuple(1 << power for power in range(11))  # 1 to 1024
_BYTES = tuple(float(1 << power) for power in range(14, 27, 2))  # 16 KiB to 64 MiB

# -- what clients see ------------------------------------------------------------------------------

REQUESTS = Counter(
    "blip2_requests_total",
    "HTTP requests by outcome: ok, invalid (4xx), overloaded, unavailable (503), error (other 5xx, "
    "or a stream that broke) or cancelled (the client left, or its time limit was over).",
    ("route", "outcome"),
)
REQUEST_DURATION = Histogram(
    "blip2_request_duration_seconds",
    "Time from a request's arrival at the ingress to the end of its response.",
    ("route",),
    _SECONDS,
)
TIME_TO_FIRST_TOKEN = Histogram(
    "blip2_time_to_first_token_seconds",
    "Time from a streaming request's arrival at the ingress to its first token.",
    ("route",),
    _SECONDS,
)
INTER_TOKEN_LATENCY = Histogram(
    "blip2_inter_token_latency_seconds",
    "Time between consecutive events of a streamed answer, per token of the later event.",
    ("route",),
    _SHORT_SECONDS,
)
ADMITTED = Counter("blip2_admitted_total", "Requests that were admitted.")
SHED = Counter(
    "blip2_shed_total",
    "Requests refused because the server was busy, by reason: wait (it would have taken too long), "
    "deadline (longer than the request had), bytes (of the bodies under way) or bodies (too many "
    "arrive slowly).",
    ("reason",),
)
REJECTIONS = Counter(
    "blip2_rejections_total",
    "Well-formed requests that were refused or given up, by error code.",
    ("reason",),
)
IMAGE_ERRORS = Counter(
    "blip2_image_errors_total",
    "Unusable images by kind of error: url, base64, empty, bytes, pixels, format, broken, "
    "truncated, timeout, memory, crash or fetch.",
    ("kind",),
)

# -- stages ----------------------------------------------------------------------------------------

STAGE_DURATION = Histogram(
    "blip2_stage_duration_seconds",
    "Time of a request in a replica of a stage, including its wait.",
    ("stage",),
    _SECONDS,
)
QUEUE_TIME = Histogram(
    "blip2_queue_time_seconds",
    "Time a request waits in a replica: for a process (preprocessor), a batch (encoder) or KV "
    "slots (generator).",
    ("stage",),
    _SECONDS,
)
QUEUE_DEPTH = Gauge("blip2_queue_depth", "Requests waiting in a replica of a stage.", ("stage",))
DROPPED = Counter(
    "blip2_dropped_total", "Requests a stage dropped because their clients had left.", ("stage",)
)
REPLAYS = Counter(
    "blip2_replays_total",
    "Calls to a stage that lost their replica and were made again, by how it was lost: died, "
    "silent, failed or checkpoint (it holds another one).",
    ("stage", "cause"),
)
QUARANTINED = Counter(
    "blip2_quarantined_total",
    "Requests that were given up because replicas of the stage died while they worked on them.",
    ("stage",),
)
STREAM_PAUSE = Histogram(
    "blip2_replay_pause_seconds",
    "Time from the loss of a stream's replica to the next token, from another one.",
    (),
    _SECONDS,
)
EXPIRED = Counter(
    "blip2_expired_total",
    "Requests a stage dropped because their time was over before it had answered.",
    ("stage",),
)
FEATURE_LOOKUPS = Counter(
    "blip2_feature_cache_lookups_total",
    "Lookups in the ingress's cache of image features by result: hit, joined (the image is already "
    "being encoded) or miss.",
    ("result",),
)
IMAGE_BYTES = Histogram("blip2_image_bytes", "Size of an image file.", (), _BYTES)
IMAGE_DECODE_TIME = Histogram(
    "blip2_image_decode_seconds", "Time to decode and resize an image.", (), _SHORT_SECONDS
)
STEP_DURATION = Histogram(
    "blip2_step_duration_seconds",
    "Time of one encoder batch (phase encode) or one engine step (prefill, decode or mixed).",
    ("phase",),
    _SHORT_SECONDS,
)
BATCH_SIZE = Histogram(
    "blip2_batch_size",
    "Images in an encoder batch, or sequences in an engine step.",
    ("stage",),
    _SIZES,
)
BATCH_CAPACITY = Counter(
    "blip2_batch_capacity_total",
    "Images or sequences that batches and steps had room for. The exact sum of batch sizes divided "
    "by this is the occupancy.",
    ("stage",),
)

# -- generation ------------------------------------------------------------------------------------

PROMPT_TOKENS = Counter(
    "blip2_prompt_tokens_total", "Prompt tokens of admitted requests, including image tokens."
)
GENERATED_TOKENS = Counter(
    "blip2_generated_tokens_total", "Generated tokens, over all answers to a request."
)
REQUEST_GENERATED_TOKENS = Histogram(
    "blip2_request_generated_tokens",
    "Generated tokens of a request that ended normally, over all its answers.",
    (),
    _TOKENS,
)
CACHED_PROMPT_TOKENS = Counter(
    "blip2_cached_prompt_tokens_total",
    "Prompt tokens whose keys and values came from the prefix cache.",
)
KV_SLOTS_USED = Gauge("blip2_kv_slots_used", "KV slots in use, by requests or by the prefix cache.")
KV_SLOTS_CACHED = Gauge(
    "blip2_kv_slots_cached",
    "KV slots that the prefix cache keeps, evicted when requests need room.",
)
KV_SLOTS_CAPACITY = Gauge(
    "blip2_kv_slots_capacity", "KV slots in total. A slot holds one token's keys and values."
)
SEQUENCES_RUNNING = Gauge("blip2_sequences_running", "Sequences being generated.")

# -- replicas --------------------------------------------------------------------------------------

MODEL_LOAD_SECONDS = Gauge(
    "blip2_model_load_seconds", "Time a replica took to load its part of the model.", ("stage",)
)
MODEL_BYTES = Gauge(
    "blip2_model_bytes", "Size of the model parameters a replica holds.", ("stage",)
)
GPU_MEMORY_USED = Gauge(
    "blip2_gpu_memory_used_bytes",
    "Memory in use on the replica's GPU, by any process.",
    ("stage",),
)
GPU_MEMORY_CAPACITY = Gauge(
    "blip2_gpu_memory_capacity_bytes", "Total memory of the replica's GPU.", ("stage",)
)
BUILD_INFO = Gauge(
    "blip2_build_info",
    "Always 1; the labels tell which versions, model, dtype and device are running.",
    ("version", "model", "dtype", "device", "torch", "transformers", "ray"),
)

# The page at /metrics makes this one itself; no replica records it.
NODE_UP = Gauge(
    "blip2_node_up",
    "1 if a node's metrics are on this page, 0 if they did not arrive in time.",
    ("node",),
)

# Every metric above, in order.
DEFINED: tuple[Metric, ...] = tuple(
    value for value in [*globals().values()] if isinstance(value, Metric)
)


def catalogue() -> list[Metric]:
    """Every metric; each histogram is followed by its exact sum."""
    return [
        entry
        for metric in DEFINED
        for entry in ((metric, metric.exact_sum) if isinstance(metric, Histogram) else (metric,))
    ]


def table() -> str:
    """The catalogue as a Markdown table, under the exported names."""
    lines = ["| metric | type | labels | |", "|---|---|---|---|"]
    for metric in DEFINED:
        kind = type(metric).__name__.lower()
        labels = ", ".join(metric.labels)
        name = f"`{metric.exported}`"
        if isinstance(metric, Histogram):
            name += f", `{metric.exact_sum.exported}`"
        lines.append(f"| {name} | {kind} | {labels} | {metric.help} |")
    return "\n".join(lines)
