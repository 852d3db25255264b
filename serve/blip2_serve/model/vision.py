"""Turns pixels into image features: ViT, Q-Former and projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Blip2Config

from blip2_serve.model.checkpoint import Checkpoint, allocate
from blip2_serve.model.processor import ImageProcessor
from blip2_serve.model.qformer import QFormer
from blip2_serve.model.vit import Vit


class ImageEncoder(nn.Module):
    """The vision half of a BLIP-2 checkpoint. Parameters are named as in the checkpoint."""

    mean: Tensor  # float32 [3, 1, 1]
    std: Tensor  # float32 [3, 1, 1]
    dtype: torch.dtype  # of all parts, except that the Q-Former stays float32 under float16

    def __init__(self, config: Blip2Config) -> None:
        super().__init__()
        self.vision_model = Vit(config.vision_config)
        self.qformer = QFormer(config.qformer_config)
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
        """Loads the vision half, and no other tensor, onto `device`.

        With float16, the Q-Former stays float32, as in transformers.

        Raises:
            StartupError: A tensor is missing or has another shape.
        """
        with torch.device("meta"):
            encoder = cls(checkpoint.config).to(dtype).eval()
            if dtype == torch.float16:  # transformers' _keep_in_fp32_modules
                encoder.qformer.float()
                encoder.query_tokens.data = encoder.query_tokens.data.float()
        allocate(encoder, device)
        checkpoint.load(dict(encoder.named_parameters()), "vision model")
        encoder.dtype = dtype
        encoder.set_normalisation(processor)
        return encoder

    def set_normalisation(self, processor: ImageProcessor) -> None:
        """Takes over the rescaling and normalisation that the processor leaves to this module."""
        device = self.query_tokens.device
        self.mean = torch.tensor(processor.mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(processor.std, device=device).view(3, 1, 1)
        self.rescale = processor.rescale

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 pixels [B, 3, H, W] -> image features [B, queries, hidden], both on the device."""
        normalised = (pixels.float() * self.rescale - self.mean) / self.std
        patches = self.vision_model(normalised.to(self.dtype))
        output = self.qformer(self.query_tokens.expand(len(pixels), -1, -1), patches)
        features: Tensor = self.language_projection(output.to(self.dtype))
        return features
