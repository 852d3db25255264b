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
from blip2_serve.model.processor import ImageProcessor
from blip2_serve.model.source import find_folder


@serve.deployment
class Preprocessor:
    """Decodes in threads: Pillow lets go of the interpreter while it decodes and resizes."""

    def __init__(self, config: AppConfig) -> None:
        logs.configure()
        self._processor = ImageProcessor.load(find_folder(config.model, config.revision))
        self._threads = ThreadPoolExecutor(config.preprocessor.threads, "decode")
        self._images = 0
        self._seconds = 0.0

    async def pixels(self, data: bytes) -> NDArray[np.uint8]:
        """An image file -> uint8 [3, S, S]. Raises InvalidImage."""
        loop = asyncio.get_running_loop()
        pixels, seconds = await loop.run_in_executor(self._threads, self._decode, data)
        self._images += 1
        self._seconds += seconds
        return pixels

    def _decode(self, data: bytes) -> tuple[NDArray[np.uint8], float]:
        start = time.perf_counter()
        pixels = self._processor.pixels(data)
        return pixels, time.perf_counter() - start

    async def stats(self) -> dict[str, Any]:
        """Images since the start, and the seconds that decoding and resizing them took."""
        return {"images": self._images, "seconds": self._seconds}
