"""Shapes of BLIP-2 checkpoints, as transformers' configurations, and random weights for them."""

from __future__ import annotations

import math

from torch import nn
from transformers import Blip2Config


def real_shape() -> Blip2Config:
    """blip2-opt-2.7b-coco: transformers' defaults for ViT and Q-Former, OPT as its card says."""
    return Blip2Config(
        vision_config={"image_size": 364},
        qformer_config={},
        text_config={
            "model_type": "opt",
            "vocab_size": 50304,
            "hidden_size": 2560,
            "word_embed_proj_dim": 2560,
            "ffn_dim": 10240,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
            "bos_token_id": 2,
            "pad_token_id": 1,
            "eos_token_id": 50118,
        },
        num_query_tokens=32,
        image_token_index=50265,
    )


def small_shape() -> Blip2Config:
    """Everything that the real one has, at a size that a CPU answers with at once."""
    return Blip2Config(
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 84,
            "patch_size": 14,
        },
        qformer_config={
            "vocab_size": 1,  # text goes to OPT only: no word embeddings are used
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "cross_attention_frequency": 2,
        },
        text_config={
            "model_type": "opt",
            "vocab_size": 1024,
            "hidden_size": 128,
            "word_embed_proj_dim": 128,
            "ffn_dim": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "bos_token_id": 2,
            "pad_token_id": 1,
            "eos_token_id": 3,
        },
        num_query_tokens=8,
        image_token_index=1023,
    )


def draw_weights(model: nn.Module) -> None:
    """Random weights at scales that let the image change the answer; transformers' do not."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "norm" in name.lower():
            nn.init.ones_(parameter)
        elif "query_tokens" in name or "embed_" in name or "position_embedding" in name:
            nn.init.normal_(parameter, std=0.5)
        else:
            nn.init.normal_(parameter, std=1.5 / math.sqrt(parameter[0].numel()))
