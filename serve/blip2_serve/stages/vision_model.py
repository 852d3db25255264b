"""What an encoder replica computes with.

Importing it takes seconds, of torch and transformers: the thread that loads the model does that.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from blip2_serve.compute.base import prepare_thread
from blip2_serve.compute.devices import check_quantize, open_device
from blip2_serve.config import AppConfig
from blip2_serve.errors import Blip2ServeError
from blip2_serve.model.checkpoint import open_checkpoint, resolve_dtype, tensor_bytes
from blip2_serve.model.processor import ImageProcessor
from blip2_serve.model.vision import ImageEncoder
from blip2_serve.observe.instruments import Model
from blip2_serve.observe.loading import measured_loading
from blip2_serve.stages.vital_signs import fingerprint_of
from blip2_serve.types import Pixels

Encoded = tuple[bytes, tuple[int, int], str]  # data, shape and dtype of an ImageFeatures


class VisionModel:
    """ViT and Q-Former, loaded and run by one thread.

    Attributes:
        blank: What an image of this checkpoint is prepared like.
        fingerprint: Of the checkpoint.
        loaded: For the instruments.
        without_numbers: Images in a row whose features were not finite.
    """

    def __init__(self, config: AppConfig, device: str) -> None:
        own = config.encoder
        self._device = open_device(device)
        place = self._device.place
        prepare_thread(place, own.threads)
        check_quantize(place, own.quantize)
        checkpoint = open_checkpoint(config.model, config.revision)
        processor = ImageProcessor.load(checkpoint.folder)
        blank = np.zeros((3, *processor.size), np.uint8)
        self.blank = Pixels(blank, int(processor.resample))
        dtype = resolve_dtype(config.dtype, place, checkpoint.config)
        self.fingerprint = fingerprint_of(config, checkpoint.folder, dtype)
        with measured_loading("vision model") as report:
            encoder = ImageEncoder.load(checkpoint, processor, place, dtype)
            report.tensor_bytes = tensor_bytes(encoder)
            self._run = self._device.prepare_encoder(encoder, own.max_batch_size, own.quantize)
        self.loaded = Model(report, self._device.gpu_memory)
        self.without_numbers = 0

    def encode(self, pixels: list[NDArray[np.uint8]]) -> list[Encoded | Blip2ServeError]:
        """Encodes images, uint8 [3, S, S] each, in one batch."""
        batch = self._device.host_tensor((len(pixels), *pixels[0].shape), torch.uint8)
        np.stack(pixels, out=batch.numpy())
        features = self._device.download(self._run(batch))
        shape = (features.shape[1], features.shape[2])
        dtype = str(features.dtype).removeprefix("torch.")
        # One number that is not finite makes the sum so too.
        finite = features.flatten(1).sum(1, dtype=torch.float32).isfinite().tolist()
        self.without_numbers = 0 if any(finite) else self.without_numbers + len(finite)
        # numpy has no bfloat16, but bytes are bytes.
        return [
            (f.view(torch.uint8).numpy().tobytes(), shape, dtype)
            if is_finite
            else Blip2ServeError("the model computed no finite numbers for this image")
            for f, is_finite in zip(features, finite, strict=True)
        ]
