"""GPU (or CPU) pool: pixels to image prefixes."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray import serve

from blip2_serve.compute.devices import open_device
from blip2_serve.config import AppConfig
from blip2_serve.model.checkpoint import open_checkpoint, resolve_dtype
from blip2_serve.model.processor import ImageProcessor
from blip2_serve.model.vision import ImageEncoder
from blip2_serve.observe import logs, metrics
from blip2_serve.observe.meter import BatchMeter
from blip2_serve.observe.recorder import RayRecorder, stage_seconds
from blip2_serve.stages.batching import Batch, BatchThread
from blip2_serve.stages.loading import measured_loading, record_model, set_threads, size_of
from blip2_serve.types import ImageFeatures

STAGE = "encoder"  # in metrics

_Encoded = tuple[bytes, tuple[int, int], str]  # data, shape and dtype of an ImageFeatures


@serve.deployment
class Encoder:
    """Encodes whatever is waiting, up to a limit, in one forward pass; never waits for more."""

    async def __init__(self, config: AppConfig, device: str) -> None:  # type: ignore[misc]
        logs.configure(config.log_format)
        self._images = self._batches = 0
        self._seconds = 0.0
        self._limit = config.encoder.max_batch_size
        self._recorder = RayRecorder()
        self._meter = BatchMeter(self._limit)
        load = partial(self._load, config, device)
        self._batching = BatchThread(load, self._encode, self._limit, self._observe)
        await self._batching.prepared
        self._recorder.report_by(self._report)
        self._meter.ready()

    def _load(self, config: AppConfig, device_name: str) -> None:
        set_threads(config.encoder.threads)
        self._device = device = open_device(device_name)
        checkpoint = open_checkpoint(config.model, config.revision)
        processor = ImageProcessor.load(checkpoint.folder)
        self._blank = np.zeros((3, *processor.size), np.uint8)
        dtype = resolve_dtype(config.dtype, device.place, checkpoint.config)
        with measured_loading("vision model") as self._loading:
            encoder = ImageEncoder.load(checkpoint, processor, device.place, dtype)
            self._loading.tensor_bytes = size_of(encoder)
            self._run = device.prepare_encoder(encoder, config.encoder.max_batch_size)

    async def encode(self, pixels: NDArray[np.uint8], digest: str) -> ImageFeatures:
        """uint8 [3, S, S] -> the prefix of the image that `digest` names."""
        with stage_seconds(self._recorder, STAGE):
            data, shape, dtype = await self._batching.result_of(pixels)
        return ImageFeatures(digest, data, shape, dtype)

    async def check_health(self) -> None:
        """Called by Serve. After a batch has failed, another tells whether all would.

        After some CUDA errors a process can compute nothing any more: it must be replaced.
        """
        if self._batching.failure:
            await self._batching.result_of(self._blank)

    async def stats(self) -> dict[str, Any]:
        """Images, batches and seconds of forward passes since the start, and what loading cost."""
        return {
            "images": self._images,
            "batches": self._batches,
            "seconds": self._seconds,
            **self._loading.stats(),
        }

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, for the autoscaling policy."""
        return self._meter.signals(self._batching.waiting).report()

    def _observe(self, batch: Batch) -> None:
        self._images += len(batch.waited)
        self._batches += 1
        self._seconds += batch.seconds
        self._meter.computed(len(batch.waited), batch.seconds)
        record = self._recorder
        for seconds in batch.waited:
            record.observe(metrics.QUEUE_TIME, seconds, stage=STAGE)
        record.observe(metrics.STEP_DURATION, batch.seconds, phase="encode")
        record.observe(metrics.BATCH_SIZE, len(batch.waited), stage=STAGE)
        record.add(metrics.BATCH_CAPACITY, self._limit, stage=STAGE)
        record.add(metrics.DROPPED, batch.dropped, stage=STAGE)

    def _report(self) -> None:
        self._recorder.set(metrics.QUEUE_DEPTH, self._batching.waiting, stage=STAGE)
        record_model(self._recorder, STAGE, self._loading, self._device.place)

    def _encode(self, pixels: list[NDArray[np.uint8]]) -> list[_Encoded]:
        batch = self._device.host_tensor((len(pixels), *pixels[0].shape), torch.uint8)
        np.stack(pixels, out=batch.numpy())
        prefixes = self._device.download(self._run(batch))
        shape = (prefixes.shape[1], prefixes.shape[2])
        dtype = str(prefixes.dtype).removeprefix("torch.")
        # numpy knows no bfloat16, but bytes are bytes.
        return [(p.view(torch.uint8).numpy().tobytes(), shape, dtype) for p in prefixes]
