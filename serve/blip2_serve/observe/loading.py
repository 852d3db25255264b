"""What loading a part of the model costs: time and memory."""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from blip2_serve import machine

logger = logging.getLogger(__name__)


@dataclass
class LoadReport:
    """What loading took. Whoever loads sets `tensor_bytes` and `dtype`."""

    tensor_bytes: int = 0
    dtype: str = ""  # of the weights, as torch names it without "torch."
    seconds: float = 0.0
    memory_before: int = 0  # bytes of anonymous memory before loading

    def stats(self) -> dict[str, float]:
        """Tensor bytes, seconds, and how many bytes this process has grown by until now."""
        return {
            "tensor_bytes": self.tensor_bytes,
            "load_seconds": self.seconds,
            "rss_anon_growth": machine.anonymous_memory() - self.memory_before,
        }


@contextmanager
def measured_loading(what: str) -> Iterator[LoadReport]:
    """Measures the block, returns memory it no longer needs to the system, and logs the report."""
    start = time.monotonic()
    report = LoadReport(memory_before=machine.anonymous_memory())
    yield report
    _return_free_memory()
    report.seconds = time.monotonic() - start
    logger.info(
        "loaded %s: %.2f GB in %.1f s, memory grew by %.2f GB",
        what,
        report.tensor_bytes / 1e9,
        report.seconds,
        report.stats()["rss_anon_growth"] / 1e9,
    )


def _return_free_memory() -> None:
    """Returns freed memory to the system; libc would keep it for itself."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc only
        trim(0)
