"""Pixels to image prefixes: ViT, Q-Former and projection, through transformers' own modules.

This module knows nothing of text, of batching or of where its pixels come from.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Blip2Config, Blip2QFormerModel, Blip2VisionModel

from blip2_serve.compute.cpu.linear import for_many_rows, pack_linears
from blip2_serve.compute.cpu.vision import pack_vision
from blip2_serve.compute.cuda.capture import Record
from blip2_serve.compute.transfer import pinned, upload
from blip2_serve.model.checkpoint import Checkpoint
from blip2_serve.model.processor import ImageProcessor

logger = logging.getLogger(__name__)

# cuDNN's is the fastest for images, where it can be had. It plans for each shape: few are recorded.
ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class ImageEncoder(nn.Module):
    """The vision half of a BLIP-2 checkpoint. Parameters are named as in the checkpoint."""

    mean: Tensor
    std: Tensor
    dtype: torch.dtype  # of all but the Q-Former under float16

    def __init__(self, config: Blip2Config) -> None:
        super().__init__()
        self.vision_model = Blip2VisionModel._from_config(config.vision_config)
        self.qformer = Blip2QFormerModel._from_config(config.qformer_config)
        self.query_tokens = nn.Parameter(
            torch.empty(1, config.num_query_tokens, config.qformer_config.hidden_size)
        )
        self.language_projection = nn.Linear(
            config.qformer_config.hidden_size, config.text_config.hidden_size
        )
        self._recorded: dict[int, Recorded] = {}  # by number of images

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        processor: ImageProcessor,
        device: torch.device,
        dtype: torch.dtype,
    ) -> ImageEncoder:
        """Reads the vision half only; the Q-Former stays float32 under float16."""
        with torch.device("meta"):
            encoder = cls(checkpoint.config).to(dtype).eval()
            if dtype == torch.float16:  # _keep_in_fp32_modules of transformers' BLIP-2
                encoder.qformer.float()
                encoder.query_tokens.data = encoder.query_tokens.data.float()
        encoder.to_empty(device=device).requires_grad_(False)
        checkpoint.load(dict(encoder.named_parameters()), "vision model")
        encoder.dtype = dtype
        encoder.set_normalisation(processor)
        return encoder

    def set_normalisation(self, processor: ImageProcessor) -> None:
        device = self.query_tokens.device
        self.mean = torch.tensor(processor.mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(processor.std, device=device).view(3, 1, 1)
        self.rescale = processor.rescale

    def pack(self) -> None:
        """Makes it fast on a CPU, where this build and the encoder's dtype allow it."""
        pack_vision(self.vision_model, self.qformer)
        pack_linears(self, for_many_rows)

    def record(self, largest: int, record: Record) -> None:
        """Records the work for each batch of 1 to `largest` images: CUDA graphs.

        An image or two keep a GPU busy for less time than Python takes to launch the kernels.
        """
        size = self.vision_model.config.image_size
        device = self.query_tokens.device
        start = time.monotonic()
        with sdpa_kernel(ATTENTION, set_priority=True):
            for images in range(largest, 0, -1):  # the largest first: others fit into its memory
                pixels = torch.zeros((images, 3, size, size), dtype=torch.uint8, device=device)
                self._recorded[images] = Recorded(self._encode, pixels, record)
        logger.info("recorded %d batches in %.1f s", largest, time.monotonic() - start)

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] on any device -> prefixes [B, queries, hidden] on the model's."""
        if recorded := self._recorded.get(len(pixels)):
            return recorded.run(pixels)
        return self._encode(upload(pixels, self.query_tokens.device))

    def _encode(self, pixels: Tensor) -> Tensor:
        normalised = (pixels.float() * self.rescale - self.mean) / self.std
        seen = self.vision_model(normalised.to(self.dtype)).last_hidden_state
        output = self.qformer(
            query_embeds=self.query_tokens.expand(len(pixels), -1, -1), encoder_hidden_states=seen
        ).last_hidden_state
        prefixes: Tensor = self.language_projection(output.to(self.dtype))
        return prefixes


class Recorded:
    """A recorded batch, with the tensors that it reads and writes."""

    @torch.inference_mode()
    def __init__(
        self, function: Callable[[Tensor], Tensor], example: Tensor, record: Record
    ) -> None:
        self._input = example
        self._output = function(example)

        def run() -> None:
            self._output.copy_(function(self._input))

        self._replay = record(run)

    def run(self, values: Tensor) -> Tensor:
        """What the function makes of `values`, of the example's shape and on any device."""
        self._input.copy_(pinned(values, self._input.device), non_blocking=True)
        self._replay()
        return self._output.clone()
