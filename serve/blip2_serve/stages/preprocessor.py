"""CPU pool: image bytes to pixels."""

from __future__ import annotations

from typing import Any

from blip2_serve.config import AppConfig
from blip2_serve.model.decode_worker import Limits
from blip2_serve.model.processor import ImageProcessor
from blip2_serve.model.source import find_configuration
from blip2_serve.observe import logs
from blip2_serve.observe.instruments import PreprocessorInstruments
from blip2_serve.observe.recorder import RayRecorder
from blip2_serve.stages.decoding import DecodePool
from blip2_serve.stages.vital_signs import VitalSigns
from blip2_serve.types import Call, Pixels, Vitals


class Preprocessor:
    """Decodes in worker processes, which an image may crash without harm to the others."""

    async def __init__(self, config: AppConfig) -> None:  # type: ignore[misc]
        logs.configure(config.log_format)
        own = config.preprocessor
        processor = ImageProcessor.load(find_configuration(config.model, config.revision))
        limits = Limits(own.max_pixels, own.decode_timeout_s, own.decode_memory_mb << 20)
        self._resample = int(processor.resample)
        self._pool = DecodePool(processor, own.threads, limits)
        self._instruments = PreprocessorInstruments(RayRecorder(), own.threads)
        await self._pool.start()
        self._instruments.ready()
        self._signs = VitalSigns(self._instruments)

    async def pixels(self, data: bytes, *, call: Call | None = None) -> Pixels:
        """Turns an image file into uint8 [3, S, S].

        Raises:
            InvalidImage: the bytes are no image that can be used.
            TimedOut: the call's time was over before the image's turn came.
        """
        self._instruments.called(call)
        with self._instruments.image(len(data)):
            decoded = await self._pool.decode(data, call.seconds_left if call else None)
        self._instruments.decoded(decoded.waited, decoded.seconds)
        return Pixels(decoded.pixels, self._resample)

    async def check_health(self) -> None:
        """Called by Serve. Raises while a lost worker cannot be replaced."""
        if self._pool.failure:
            raise self._pool.failure

    async def alive(self, caller: str) -> Vitals:
        """Called by each ingress replica once per second, while it has work here.

        A replica that is not healthy is one that does not answer.
        """
        await self.check_health()
        return self._signs.answer(caller)

    async def stats(self) -> dict[str, Any]:
        return self._instruments.stats()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, for the autoscaling policy."""
        return self._instruments.signals().report()

    def __del__(self) -> None:
        """Called by Serve, at the end of a replica that is stopped and not killed."""
        if "_pool" in self.__dict__:
            self._pool.close()
