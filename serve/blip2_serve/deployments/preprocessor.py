"""CPU pool: image bytes to pixels."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

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

    async def pixels(self, data: bytes) -> NDArray[np.uint8]:
        """An image file -> uint8 [3, S, S]. Raises InvalidImage."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._processor.pixels, data)
