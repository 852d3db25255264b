"""Random weights for the shapes of BLIP-2 in shapes/: full (2.7b), medium (108M) and small."""

from __future__ import annotations

import math
from pathlib import Path

from torch import nn
from transformers import Blip2Config

from loadtest.results import read_json

SHAPES = Path(__file__).parent / "shapes"


def shape(name: str) -> Blip2Config:
    return Blip2Config(**read_json(SHAPES / f"{name}.json"))


def draw_weights(model: nn.Module) -> None:
    """Draws weights at scales that let the image change the answer, unlike transformers' own."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "norm" in name.lower():
            nn.init.ones_(parameter)
        elif "query_tokens" in name or "embed_" in name or "position_embedding" in name:
            nn.init.normal_(parameter, std=0.5)
        else:
            nn.init.normal_(parameter, std=1.5 / math.sqrt(parameter[0].numel()))
