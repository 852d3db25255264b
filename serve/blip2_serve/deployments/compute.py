"""What the two stages that hold a part of the model have in common."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
import torch

from blip2_serve import metrics
from blip2_serve.metrics import Recorder
from blip2_serve.model import memory

logger = logging.getLogger(__name__)


@dataclass
class LoadReport:
    """What loading a part of the model took."""

    tensor_bytes: int = 0
    seconds: float = 0.0
    rss_anon_before: int = 0
    dtype: str = ""

    def stats(self) -> dict[str, float]:
        """Bytes of the tensors, seconds, and growth of this process's memory since before, now."""
        return {
            "tensor_bytes": self.tensor_bytes,
            "load_seconds": self.seconds,
            "rss_anon_growth": memory.rss_anon() - self.rss_anon_before,
        }


def library_environment() -> dict[str, str]:
    """The environment that gives replicas better threads and memory than torch's and libc's.

    What a thread does while it waits for the others decides. If it sleeps, waking it takes as long
    as a small layer; if it spins, it takes the core from another replica. Intel's OpenMP spins for
    as long as it is told and lets any other thread have the core meanwhile; torch's own (libgomp)
    does one or the other. And a step makes and drops some thousand small things, which jemalloc, as
    Ray ships it, does faster than libc. DESIGN.md has the figures.
    """
    preloaded, threads = [], {"OMP_WAIT_POLICY": "PASSIVE"}
    if openmp := _intel_openmp():
        preloaded, threads = [openmp], {"KMP_BLOCKTIME": "100us"}
    jemalloc = Path(ray.__file__).with_name("core") / "libjemalloc.so"
    if jemalloc.exists() and platform.machine() == "x86_64":  # elsewhere pages may be larger
        preloaded.append(jemalloc)
    return threads | ({"LD_PRELOAD": ":".join(map(str, preloaded))} if preloaded else {})


def _intel_openmp() -> Path | None:
    try:
        files = importlib.metadata.files("intel-openmp") or []
    except importlib.metadata.PackageNotFoundError:  # it exists for Linux on x86 only
        return None
    found = (Path(file.locate()).resolve() for file in files if file.name == "libiomp5.so")
    return next(found, None)


def set_threads(threads: int | None) -> None:
    """How many threads torch uses when called from this thread; None stands for all cores.

    Ray sets OMP_NUM_THREADS to the share of a core that was asked for, that is, to 1. OpenMP
    counts for each calling thread, so each thread that computes must call this.
    """
    torch.set_num_threads(threads or os.cpu_count() or 1)


@contextmanager
def measured_loading(what: str) -> Iterator[LoadReport]:
    """Measures the block and logs it; the block sets `tensor_bytes`."""
    start = time.monotonic()
    report = LoadReport(rss_anon_before=memory.rss_anon())
    yield report
    report.seconds = time.monotonic() - start
    logger.info(
        "loaded %s: %.2f GB in %.1f s, memory grew by %.2f GB",
        what,
        report.tensor_bytes / 1e9,
        report.seconds,
        report.stats()["rss_anon_growth"] / 1e9,
    )


def record_model(recorder: Recorder, stage: str, loading: LoadReport, device: torch.device) -> None:
    """What there is to say about a stage's model and the memory that it lies in."""
    recorder.set(metrics.MODEL_LOAD_SECONDS, loading.seconds, stage=stage)
    recorder.set(metrics.MODEL_BYTES, loading.tensor_bytes, stage=stage)
    if device.type == "cuda":
        free, capacity = torch.cuda.mem_get_info(device)
        recorder.set(metrics.GPU_MEMORY_USED, capacity - free, stage=stage)
        recorder.set(metrics.GPU_MEMORY_CAPACITY, capacity, stage=stage)


def size_of(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters, each counted once."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still have on the device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory.available()
