"""GPU (or CPU) pool: pixels to image features."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blip2_serve.compute.base import Device, prepare_thread
from blip2_serve.compute.devices import check_quantize, open_device
from blip2_serve.config import AppConfig
from blip2_serve.engine.progress import is_stalled
from blip2_serve.errors import Blip2ServeError, WrongCheckpoint
from blip2_serve.model.checkpoint import open_checkpoint, resolve_dtype, tensor_bytes
from blip2_serve.model.processor import ImageProcessor
from blip2_serve.model.vision import ImageEncoder
from blip2_serve.observe import logs
from blip2_serve.observe.instruments import EncoderInstruments, Model
from blip2_serve.observe.loading import measured_loading
from blip2_serve.observe.recorder import RayRecorder
from blip2_serve.stages.batching import BatchThread
from blip2_serve.stages.deadline import expiry
from blip2_serve.stages.vital_signs import VitalSigns, fingerprint_of
from blip2_serve.types import Call, ImageFeatures, Pixels, Vitals

MAX_WITHOUT_NUMBERS = 3  # images in a row: then it may not be the images' fault

_Encoded = tuple[bytes, tuple[int, int], str]  # data, shape and dtype of an ImageFeatures


class Encoder:
    """Encodes whatever is waiting, up to a limit, in one forward pass; never waits for more."""

    async def __init__(self, config: AppConfig, device: str) -> None:  # type: ignore[misc]
        logs.configure(config.log_format)
        limit = config.encoder.max_batch_size
        self._without_numbers = 0  # images in a row whose features were not finite
        self._instruments = EncoderInstruments(RayRecorder(), limit)
        load = partial(self._load, config, open_device(device))
        self._batching = BatchThread(load, self._encode, limit, self._instruments.batch)
        await self._batching.prepared
        self._instruments.ready(self._loaded, lambda: self._batching.waiting)
        self._signs = VitalSigns(self._instruments, self._fingerprint)

    def _load(self, config: AppConfig, device: Device) -> None:
        own = config.encoder
        prepare_thread(device.place, own.threads)
        check_quantize(device.place, own.quantize)
        self._device = device
        checkpoint = open_checkpoint(config.model, config.revision)
        processor = ImageProcessor.load(checkpoint.folder)
        blank = np.zeros((3, *processor.size), np.uint8)
        self._blank = Pixels(blank, int(processor.resample))
        dtype = resolve_dtype(config.dtype, device.place, checkpoint.config)
        self._fingerprint = fingerprint_of(config, checkpoint.folder, dtype)
        with measured_loading("vision model") as report:
            encoder = ImageEncoder.load(checkpoint, processor, device.place, dtype)
            report.tensor_bytes = tensor_bytes(encoder)
            self._run = device.prepare_encoder(encoder, own.max_batch_size, own.quantize)
        self._loaded = Model(report, device.gpu_memory)

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
        if not pixels.is_like(self._blank):
            raise WrongCheckpoint("the image was prepared for another checkpoint")
        with self._instruments.in_stage():
            data, shape, dtype = await self._batching.result_of(pixels.values, expires)
        return ImageFeatures(digest, data, shape, dtype, self._fingerprint)

    def _encode(self, pixels: list[NDArray[np.uint8]]) -> list[_Encoded | Blip2ServeError]:
        batch = self._device.host_tensor((len(pixels), *pixels[0].shape), torch.uint8)
        np.stack(pixels, out=batch.numpy())
        features = self._device.download(self._run(batch))
        shape = (features.shape[1], features.shape[2])
        dtype = str(features.dtype).removeprefix("torch.")
        # One number that is not finite makes the sum so too.
        finite = features.flatten(1).sum(1, dtype=torch.float32).isfinite().tolist()
        self._without_numbers = 0 if any(finite) else self._without_numbers + len(finite)
        # numpy has no bfloat16, but bytes are bytes.
        return [
            (f.view(torch.uint8).numpy().tobytes(), shape, dtype)
            if is_finite
            else Blip2ServeError("the model computed no finite numbers for this image")
            for f, is_finite in zip(features, finite, strict=True)
        ]

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
        if self._batching.failure or self._without_numbers >= MAX_WITHOUT_NUMBERS:
            await self._batching.result_of(self._blank.values)

    async def stats(self) -> dict[str, Any]:
        return self._instruments.stats()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, for the autoscaling policy."""
        return self._instruments.signals().report()
