"""The vision transformer; arithmetic and names are those of transformers' `Blip2VisionModel`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import Blip2VisionConfig

from blip2_serve.model.activations import activation

# query, key and value, [B, heads, tokens, head_dim] each -> [B, tokens, heads, head_dim]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The `Attend` in plain torch."""
    return scaled_dot_product_attention(query, key, value).transpose(1, 2)


class Embeddings(nn.Module):
    """Patches and a token for the whole image, each with its position."""

    def __init__(self, config: Blip2VisionConfig) -> None:
        super().__init__()
        width, size = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=size, stride=size)
        positions = 1 + (config.image_size // size) ** 2
        self.position_embedding = nn.Parameter(torch.empty(1, positions, width))

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, tokens, width]."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(pixels), -1, -1), patches], dim=1)
        return tokens + self.position_embedding


class SelfAttention(nn.Module):
    def __init__(self, config: Blip2VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads: int = config.num_attention_heads
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.projection = nn.Linear(width, width)
        self.attend: Attend = attend

    def forward(self, x: Tensor) -> Tensor:
        """[B, tokens, width] -> the same."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended: Tensor = self.projection(self.attend(*qkv).flatten(2))
        return attended


class Mlp(nn.Module):
    def __init__(self, config: Blip2VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation_fn = activation(config.hidden_act)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.activation_fn(self.fc1(x)))
        return y


class VitLayer(nn.Module):
    def __init__(self, config: Blip2VisionConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        """[B, tokens, width] -> the same."""
        x = x + self.self_attn(self.layer_norm1(x))
        y: Tensor = x + self.mlp(self.layer_norm2(x))
        return y


class VitEncoder(nn.Module):
    def __init__(self, config: Blip2VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VitLayer(config) for _ in range(config.num_hidden_layers))

    def __iter__(self) -> Iterator[VitLayer]:
        return cast("Iterator[VitLayer]", iter(self.layers))


class Vit(nn.Module):
    def __init__(self, config: Blip2VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = VitEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H, W] -> [B, tokens, width]."""
        x: Tensor = self.embeddings(pixels)
        for layer in self.encoder:
            x = layer(x)
        y: Tensor = self.post_layernorm(x)
        return y
