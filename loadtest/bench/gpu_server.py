"""For `gpu_app.py`: the server's configuration, and what it, its processes and the GPU did."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from blip2_serve.config import AppConfig
from blip2_serve.observe import metrics

# Ray's own default is 10 s, longer than a window. Milliseconds; below a second makes no difference.
QUICK_METRICS = {"RAY_metrics_report_interval_ms": "1000"}
METRICS_WITHIN_S, METRICS_POLL_S = 12.0, 0.25
SAMPLE_EVERY_S = 0.05
WAIT_S = 60.0  # nobody is refused, even while a killed replica is replaced
ONGOING = 512  # requests per replica at once: nothing but the stages themselves limits 256 users

Totals = dict[tuple[str, str], float]  # by metric and its label, summed over replicas
CpuSeconds = dict[tuple[int, str], float]  # by pid and name

_PHASES, _STAGES = ("encode", "prefill", "mixed", "decode"), ("encoder", "generator")
_ALL_STAGES = ("preprocessor", *_STAGES)
# Figure: metric, the values of its label, and what turns it into the figure's unit.
_MEANS = {
    "step_ms": (metrics.STEP_DURATION, _PHASES, 1000),
    "batch": (metrics.BATCH_SIZE, _STAGES, 1),
    "queue_ms": (metrics.QUEUE_TIME, _ALL_STAGES, 1000),
    "stage_ms": (metrics.STAGE_DURATION, _ALL_STAGES, 1000),
}


@dataclass(frozen=True)
class Size:
    """The replicas and limits of the server, and of the two bare processes."""

    ingress: int = 4
    preprocessors: int = 3
    threads: int = 2  # of each preprocessor
    max_batch_size: int = 8
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 4096


def configuration(
    model: str, device: str, dtype: str, size: Size, quantize: str | None = None
) -> AppConfig:
    """`quantize` is the encoder's."""
    roomy = {"max_ongoing_requests": ONGOING}
    patient = {"max_wait_s": WAIT_S, "initial_requests": ONGOING}
    return AppConfig.model_validate(
        {
            "model": model,
            "served_model_name": "blip2",
            "device": device,
            "dtype": dtype,
            "ingress": {"num_replicas": size.ingress, "admission": patient, **roomy},
            "preprocessor": {
                "num_replicas": size.preprocessors,
                "threads": size.threads,
                **roomy,
            },
            "encoder": {
                "max_batch_size": size.max_batch_size,
                "quantize": quantize,
                **roomy,
            },
            "generator": {
                "max_num_seqs": size.max_num_seqs,
                "max_waiting": ONGOING,
                "max_num_batched_tokens": size.max_num_batched_tokens,
                **roomy,
            },
        }
    )


# -- what the server says about itself -------------------------------------------------------------


class Meters:
    """The server's counters, from its /metrics, which lag behind by a second or two."""

    def __init__(self, url: str) -> None:
        self._url = url.removesuffix("/v1") + "/metrics"
        self._before = totals(self._page())

    def take(self, images: int, tokens: int) -> dict[str, dict[str, float]]:
        """Means since the last call, once so many images and tokens are counted.

        `complete` is 0 if they were not in time.
        """
        deadline = time.monotonic() + METRICS_WITHIN_S
        while True:
            now = totals(self._page())
            seen = {key: value - self._before.get(key, 0.0) for key, value in now.items()}
            complete = (
                seen.get((metrics.BATCH_SIZE.exact_sum.exported, "encoder"), 0) >= images
                and seen.get((metrics.GENERATED_TOKENS.exported, ""), 0) >= tokens
            )
            if complete or time.monotonic() > deadline:
                break
            time.sleep(METRICS_POLL_S)
        self._before = now
        return {"complete": {"": float(complete)}, **_means(seen)}

    def _page(self) -> str:
        return httpx.get(self._url, timeout=30, trust_env=False).raise_for_status().text


def totals(page: str) -> Totals:
    """Sums over replicas, by metric and its phase or stage."""
    found: Totals = defaultdict(float)
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name.startswith("ray_blip2_"):
                label = sample.labels.get("phase") or sample.labels.get("stage") or ""
                found[sample.name, label] += sample.value
    return dict(found)


def _means(seen: Totals) -> dict[str, dict[str, float]]:
    means: dict[str, dict[str, float]] = {}
    for figure, (metric, labels, unit) in _MEANS.items():
        for label in labels:
            count = seen.get((f"{metric.exported}_count", label), 0)
            if count:
                total = seen.get((metric.exact_sum.exported, label), 0)
                means.setdefault(figure, {})[label] = unit * total / count
    return means


# -- what processes and the GPU did ----------------------------------------------------------------


@dataclass
class Usage:
    """What was used while a window was open."""

    seconds: float = 0.0
    cpu_s: dict[str, float] = field(default_factory=dict)  # by process name
    gpu_busy: float | None = None  # share of the time; None without NVIDIA's library


@contextmanager
def usage(cpu_seconds: Callable[[], CpuSeconds]) -> Iterator[Usage]:
    """Fills in the usage of the block."""
    used = Usage()
    done = threading.Event()
    sampler = threading.Thread(target=_sample_gpu, args=(done, used), daemon=True)
    start, before = time.perf_counter(), cpu_seconds()
    sampler.start()
    try:
        yield used
    finally:
        done.set()
        used.seconds = time.perf_counter() - start
        spent: dict[str, float] = defaultdict(float)
        for (pid, name), seconds in cpu_seconds().items():
            spent[name] += seconds - before.get((pid, name), 0.0)
        used.cpu_s = dict(sorted(spent.items(), key=lambda item: -item[1]))
        sampler.join()


def _sample_gpu(done: threading.Event, used: Usage) -> None:
    samples: list[float] = []
    with contextlib.suppress(Exception):  # no NVIDIA library, or no GPU
        import pynvml  # type: ignore[import-not-found,unused-ignore]

        pynvml.nvmlInit()
        gpu: Any = pynvml.nvmlDeviceGetHandleByIndex(0)
        while not done.wait(SAMPLE_EVERY_S):
            samples.append(pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100)
    used.gpu_busy = statistics.fmean(samples) if samples else None
