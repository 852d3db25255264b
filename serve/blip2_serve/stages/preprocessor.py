"""CPU pool: image bytes to pixels."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray import serve

from blip2_serve.config import AppConfig
from blip2_serve.model.processor import ImageProcessor
from blip2_serve.model.source import find_configuration
from blip2_serve.observe import logs, metrics
from blip2_serve.observe.meter import BatchMeter
from blip2_serve.observe.metrics import harmless
from blip2_serve.observe.recorder import RayRecorder, stage_seconds

STAGE = "preprocessor"  # in metrics


@serve.deployment
class Preprocessor:
    """Decodes in threads: Pillow lets go of the interpreter while it decodes and resizes."""

    def __init__(self, config: AppConfig) -> None:
        logs.configure(config.log_format)
        self._processor = ImageProcessor.load(find_configuration(config.model, config.revision))
        self._threads = ThreadPoolExecutor(config.preprocessor.threads, "decode")
        self._limit = config.preprocessor.threads
        self._recorder = RayRecorder()
        self._here = 0  # images, waiting or being decoded
        self._meter = BatchMeter(threads=self._limit)
        self._images = 0
        self._seconds = 0.0
        self._measure = harmless(self._observe)
        self._recorder.report_by(self._report)
        self._meter.ready()

    async def pixels(self, data: bytes) -> NDArray[np.uint8]:
        """An image file -> uint8 [3, S, S]. Raises InvalidImage."""
        loop = asyncio.get_running_loop()
        submitted = time.perf_counter()
        self._recorder.observe(metrics.IMAGE_BYTES, len(data))
        self._here += 1
        try:
            with stage_seconds(self._recorder, STAGE):
                pixels, start, seconds = await loop.run_in_executor(
                    self._threads, self._decode, data
                )
        finally:
            self._here -= 1
        self._measure(start - submitted, seconds)
        return pixels

    def _observe(self, waited: float, seconds: float) -> None:
        self._images += 1
        self._seconds += seconds
        self._meter.computed(1, seconds)
        self._recorder.observe(metrics.QUEUE_TIME, waited, stage=STAGE)
        self._recorder.observe(metrics.IMAGE_DECODE_TIME, seconds)

    def _decode(self, data: bytes) -> tuple[NDArray[np.uint8], float, float]:
        """The pixels, when it began, and the seconds that it took."""
        start = time.perf_counter()
        pixels = self._processor.pixels(data)
        return pixels, start, time.perf_counter() - start

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, for the autoscaling policy."""
        return self._meter.signals(self._waiting).report()

    @property
    def _waiting(self) -> int:
        return max(0, self._here - self._limit)

    def _report(self) -> None:
        self._recorder.set(metrics.QUEUE_DEPTH, self._waiting, stage=STAGE)

    async def stats(self) -> dict[str, Any]:
        """Images since the start, and the seconds that decoding and resizing them took."""
        return {"images": self._images, "seconds": self._seconds}
