"""GPU (or CPU) pool: pixels to image features."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from blip2_serve import machine
from blip2_serve.config import AppConfig
from blip2_serve.engine.progress import is_stalled
from blip2_serve.errors import Blip2ServeError, WrongCheckpoint
from blip2_serve.observe import logs
from blip2_serve.observe.instruments import EncoderInstruments
from blip2_serve.observe.recorder import RayRecorder
from blip2_serve.stages.batching import BatchThread
from blip2_serve.stages.deadline import expiry
from blip2_serve.stages.vital_signs import VitalSigns
from blip2_serve.types import Call, ImageFeatures, Pixels, Vitals

if TYPE_CHECKING:
    from blip2_serve.stages.vision_model import Encoded, VisionModel

MAX_WITHOUT_NUMBERS = 3  # images in a row: then it may not be the images' fault


class Encoder:
    """Encodes whatever is waiting, up to a limit, in one forward pass; never waits for more."""

    async def __init__(self, config: AppConfig, device: str) -> None:  # type: ignore[misc]
        logs.configure(config.log_format)
        limit = config.encoder.max_batch_size
        self._instruments = EncoderInstruments(RayRecorder(), limit)
        load = partial(self._load, config, device)
        self._batching = BatchThread(load, self._encode, limit, self._instruments.batch)
        await self._batching.prepared
        self._instruments.ready(self._model.loaded, lambda: self._batching.waiting)
        self._signs = VitalSigns(self._instruments, self._model.fingerprint)

    def _load(self, config: AppConfig, device: str) -> None:
        # First: a replica that starts should not take the cores from those that serve.
        if device == "cpu":
            machine.give_way()
        from blip2_serve.stages.vision_model import VisionModel

        self._model: VisionModel = VisionModel(config, device)

    async def encode(
        self, pixels: Pixels, digest: str, *, call: Call | None = None
    ) -> ImageFeatures:
        """Turns uint8 [3, S, S] into the features of the image that `digest` names.

        Raises:
            TimedOut: the call's time was over before a batch had room for the image.
            WrongCheckpoint: the image was prepared for another one.
        """
        expires = expiry(call)
        self._instruments.called(call)
        if not pixels.is_like(self._model.blank):
            raise WrongCheckpoint("the image was prepared for another checkpoint")
        with self._instruments.in_stage():
            data, shape, dtype = await self._batching.result_of(pixels.values, expires)
        return ImageFeatures(digest, data, shape, dtype, self._model.fingerprint)

    def _encode(self, pixels: list[NDArray[np.uint8]]) -> list[Encoded | Blip2ServeError]:
        return self._model.encode(pixels)

    async def alive(self, caller: str) -> Vitals:
        """Called by each ingress replica once per second, while it has work here.

        A replica that is not healthy is one that does not answer.
        """
        await self.check_health()
        return self._signs.answer(caller)

    async def check_health(self) -> None:
        """Called by Serve. After a failed batch, tries a blank image and raises if that fails too.

        So it does after three images in a row whose features were not finite.
        Some CUDA errors leave a process unable to compute anything: it must be replaced. So must
        one whose batch does not end.
        """
        stalled_s = self._batching.stalled_s
        if is_stalled(stalled_s, self._batching.usual_s):
            raise RuntimeError(f"the encoder has made no progress for {stalled_s:.0f} s")
        if self._batching.failure or self._model.without_numbers >= MAX_WITHOUT_NUMBERS:
            await self._batching.result_of(self._model.blank.values)

    async def stats(self) -> dict[str, Any]:
        return self._instruments.stats()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, for the autoscaling policy."""
        return self._instruments.signals().report()
