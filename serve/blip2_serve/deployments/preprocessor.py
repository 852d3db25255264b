"""CPU pool: image bytes to pixels."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray import serve

from blip2_serve import logs
from blip2_serve.config import AppConfig
from blip2_serve.deployments.meter import BatchMeter
from blip2_serve.model.processor import ImageProcessor
from blip2_serve.model.source import find_folder


@serve.deployment
class Preprocessor:
    """Decodes in threads: Pillow lets go of the interpreter while it decodes and resizes."""

    def __init__(self, config: AppConfig) -> None:
        logs.configure()
        self._processor = ImageProcessor.load(find_folder(config.model, config.revision))
        self._count = config.preprocessor.threads
        self._threads = ThreadPoolExecutor(self._count, "decode")
        self._images = 0
        self._seconds = 0.0
        self._here = 0  # images that wait or are being decoded
        self._meter = BatchMeter(threads=self._count)

    async def pixels(self, data: bytes) -> NDArray[np.uint8]:
        """An image file -> uint8 [3, S, S]. Raises InvalidImage."""
        loop = asyncio.get_running_loop()
        self._here += 1
        try:
            pixels, seconds = await loop.run_in_executor(self._threads, self._decode, data)
        finally:
            self._here -= 1
        self._images += 1
        self._seconds += seconds
        self._meter.computed(1, seconds)
        return pixels

    def _decode(self, data: bytes) -> tuple[NDArray[np.uint8], float]:
        start = time.perf_counter()
        pixels = self._processor.pixels(data)
        return pixels, time.perf_counter() - start

    async def stats(self) -> dict[str, Any]:
        """Images since the start, and the seconds that decoding and resizing them took."""
        return {"images": self._images, "seconds": self._seconds}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, for the autoscaling policy."""
        return self._meter.signals(max(0, self._here - self._count)).report()
