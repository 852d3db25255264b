"""Shapes of BLIP-2 checkpoints as transformers' configurations, and random weights for them."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from transformers import Blip2Config


def real_shape() -> Blip2Config:
    """blip2-opt-2.7b-coco: transformers' defaults for ViT and Q-Former, OPT-2.7b, 364 pixels."""
    text = _opt(2560, 32, 32, vocabulary=50304, positions=2048, eos=50118)
    return Blip2Config(
        vision_config={"image_size": 364},
        qformer_config={},
        text_config=text,
        num_query_tokens=32,
        image_token_index=50265,
    )


def medium_shape(vocabulary: int, image_token: int) -> Blip2Config:
    """108M parameters: computing dominates, and two CPU cores can still answer."""
    return Blip2Config(
        vision_config=_layers(384, 4, 6, 6) | {"image_size": 224, "patch_size": 14},
        qformer_config=_qformer(256, 4, 4, 4),
        text_config=_opt(768, 12, 12, vocabulary=vocabulary, positions=2048, eos=2),
        num_query_tokens=32,
        image_token_index=image_token,
    )


def small_shape() -> Blip2Config:
    """Every part of the real shape, at a size that a CPU answers at once."""
    return Blip2Config(
        vision_config=_layers(128, 2, 3, 4) | {"image_size": 84, "patch_size": 14},
        qformer_config=_qformer(64, 2, 2, 4),
        text_config=_opt(128, 3, 4, vocabulary=1024, positions=256, eos=3),
        num_query_tokens=8,
        image_token_index=1023,
    )


def _layers(width: int, factor: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": factor * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def _qformer(width: int, factor: int, layers: int, heads: int) -> dict[str, Any]:
    # Only OPT reads text, so the Q-Former's word embeddings are unused.
    unused = {"vocab_size": 1, "cross_attention_frequency": 2}
    return _layers(width, factor, layers, heads) | unused


def _opt(
    width: int, layers: int, heads: int, *, vocabulary: int, positions: int, eos: int
) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "ffn_dim": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": positions,
        "bos_token_id": 2,
        "pad_token_id": 1,
        "eos_token_id": eos,
    }


def draw_weights(model: nn.Module) -> None:
    """Random weights at scales that let the image change the answer, unlike transformers' own."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "norm" in name.lower():
            nn.init.ones_(parameter)
        elif "query_tokens" in name or "embed_" in name or "position_embedding" in name:
            nn.init.normal_(parameter, std=0.5)
        else:
            nn.init.normal_(parameter, std=1.5 / math.sqrt(parameter[0].numel()))
