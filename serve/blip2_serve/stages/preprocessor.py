"""CPU pool: image bytes to pixels."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2_serve.config import AppConfig
from blip2_serve.model.processor import ImageProcessor
from blip2_serve.model.source import find_configuration
from blip2_serve.observe import logs
from blip2_serve.observe.instruments import PreprocessorInstruments
from blip2_serve.observe.recorder import RayRecorder
from blip2_serve.stages.vital_signs import VitalSigns
from blip2_serve.types import Call, Vitals


class Preprocessor:
    """Decodes in threads: Pillow releases the interpreter while it decodes and resizes."""

    def __init__(self, config: AppConfig) -> None:
        logs.configure(config.log_format)
        threads = config.preprocessor.threads
        self._processor = ImageProcessor.load(find_configuration(config.model, config.revision))
        self._threads = ThreadPoolExecutor(threads, "decode")
        self._instruments = PreprocessorInstruments(RayRecorder(), threads)
        self._instruments.ready()
        self._signs = VitalSigns(self._instruments)

    async def pixels(self, data: bytes, *, call: Call | None = None) -> NDArray[np.uint8]:
        """Turns an image file into uint8 [3, S, S].

        Raises:
            InvalidImage: the bytes are no image that can be used.
        """
        loop = asyncio.get_running_loop()
        submitted = time.perf_counter()
        with self._instruments.image(len(data)):
            pixels, start, seconds = await loop.run_in_executor(self._threads, self._decode, data)
        self._instruments.decoded(start - submitted, seconds)
        return pixels

    def _decode(self, data: bytes) -> tuple[NDArray[np.uint8], float, float]:
        """Returns the pixels, when decoding began (`time.perf_counter`), and its seconds."""
        start = time.perf_counter()
        pixels = self._processor.pixels(data)
        return pixels, start, time.perf_counter() - start

    async def alive(self, caller: str) -> Vitals:
        """Called by each ingress replica once per second, while it has work here."""
        return self._signs.answer(caller)

    async def stats(self) -> dict[str, Any]:
        return self._instruments.stats()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, for the autoscaling policy."""
        return self._instruments.signals().report()
