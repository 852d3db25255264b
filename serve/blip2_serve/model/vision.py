"""Pixels to image prefixes: ViT, Q-Former and projection, through transformers' own modules.

This module knows nothing of text, of batching or of where its pixels come from.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2Config, Blip2QFormerModel, Blip2VisionModel

from blip2_serve.model.checkpoint import Checkpoint
from blip2_serve.model.linear import for_many_rows, pack_linears
from blip2_serve.model.packed_vision import pack_vision
from blip2_serve.model.processor import ImageProcessor
from blip2_serve.model.transfer import upload

logger = logging.getLogger(__name__)


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

    def compile_layers(self, largest: int, backend: Any = "inductor") -> None:
        """Compiles every kind of layer, for batches of up to `largest` images, and runs them all.

        Layers of one kind share their code: two compilations each, for one image and for any
        number, since batches are not padded. From one image on, arithmetic is what takes a GPU's
        time here, and an image of padding would take as long as another. Where compiling fails
        (it wants Triton and a C compiler), the encoder stays as it is.
        """
        stacks = (self.vision_model.encoder.layers, self.qformer.encoder.layer)
        plain = [list(stack) for stack in stacks]
        size = self.vision_model.config.image_size
        start = time.monotonic()
        for stack in stacks:
            for number, layer in enumerate(stack):
                stack[number] = torch.compile(layer, backend=backend, dynamic=True)
        try:
            for batch in range(largest, 0, -1):
                self(torch.zeros((batch, 3, size, size), dtype=torch.uint8))
        except Exception:  # a compiler may trip over anything
            logger.warning("the vision model cannot be compiled, it runs as it is", exc_info=True)
            for stack, layers in zip(stacks, plain, strict=True):
                for number, layer in enumerate(layers):
                    stack[number] = layer
        else:
            logger.info("compiled the vision model in %.0f s", time.monotonic() - start)

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] on any device -> prefixes [B, queries, hidden] on the model's."""
        pixels = upload(pixels, self.query_tokens.device).float()
        normalised = (pixels * self.rescale - self.mean) / self.std
        seen = self.vision_model(normalised.to(self.dtype)).last_hidden_state
        output = self.qformer(
            query_embeds=self.query_tokens.expand(len(pixels), -1, -1), encoder_hidden_states=seen
        ).last_hidden_state
        prefixes: Tensor = self.language_projection(output.to(self.dtype))
        return prefixes
