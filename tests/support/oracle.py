"""The reference for answers: transformers' `generate` on the CPU in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor


class Oracle:
    """transformers' model and processor of a checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self.processor = Blip2Processor.from_pretrained(folder)
        self.model = Blip2ForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
        eos = self.model.config.text_config.eos_token_id
        self.eos = {eos} if isinstance(eos, int) else set(eos)

    @torch.inference_mode()
    def tokens(self, image: Image.Image, prompt: str, **generate: Any) -> list[int]:
        """Generates greedily and returns the new token ids without the final eos."""
        inputs = self.processor(images=image, text=prompt, return_tensors="pt")
        ids = self.model.generate(**inputs, do_sample=False, **generate)
        return self.without_eos(ids[0, inputs["input_ids"].shape[1] :].tolist())

    def without_eos(self, ids: list[int]) -> list[int]:
        return ids[:-1] if ids and ids[-1] in self.eos else ids
