"""What the two stages that hold a part of the model have in common."""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from blip2_serve import machine
from blip2_serve.observe import metrics
from blip2_serve.observe.metrics import Recorder

logger = logging.getLogger(__name__)


@dataclass
class LoadReport:
    """What loading a part of the model took."""

    tensor_bytes: int = 0
    seconds: float = 0.0
    memory_before: int = 0
    dtype: str = ""

    def stats(self) -> dict[str, float]:
        """Bytes of the tensors, seconds, and growth of this process's memory since before, now."""
        return {
            "tensor_bytes": self.tensor_bytes,
            "load_seconds": self.seconds,
            "rss_anon_growth": machine.anonymous_memory() - self.memory_before,
        }


def set_threads(threads: int | None) -> None:
    """Sets how many threads torch uses when called from this thread; None: all cores it may use.

    Ray sets OMP_NUM_THREADS to the share of a core that was asked for, that is, to 1. OpenMP
    counts for each calling thread, so each thread that computes must call this.
    """
    torch.set_num_threads(threads or machine.cores())


@contextmanager
def measured_loading(what: str) -> Iterator[LoadReport]:
    """Measures the block and logs it; the block sets `tensor_bytes`."""
    start = time.monotonic()
    report = LoadReport(memory_before=machine.anonymous_memory())
    yield report
    _give_back_memory()
    report.seconds = time.monotonic() - start
    logger.info(
        "loaded %s: %.2f GB in %.1f s, memory grew by %.2f GB",
        what,
        report.tensor_bytes / 1e9,
        report.seconds,
        report.stats()["rss_anon_growth"] / 1e9,
    )


def _give_back_memory() -> None:
    """Gives memory that loading no longer needs back to the system; libc would keep it."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)


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
