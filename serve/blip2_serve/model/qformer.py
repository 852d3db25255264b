"""The Q-Former with queries only. Its arithmetic and names are those of transformers' module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn
from transformers import Blip2QFormerConfig

from blip2_serve.model.activations import activation
from blip2_serve.model.vit import Attend, attend


class Heads(nn.Module):
    """Attention of `x` to `seen`."""

    def __init__(self, config: Blip2QFormerConfig, seen_width: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads: int = config.num_attention_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(seen_width, width)
        self.value = nn.Linear(seen_width, width)
        self.attend: Attend = attend

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """[B, queries, width], [B, tokens, seen width] -> [B, queries, width]."""
        projected = (self.query(x), self.key(seen), self.value(seen))
        by_head = (p.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for p in projected)
        return self.attend(*by_head).flatten(2)


class Output(nn.Module):
    """A product, added to `x`, and the norm of the sum: how each part of a layer ends."""

    def __init__(self, config: Blip2QFormerConfig, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        z: Tensor = self.LayerNorm(self.dense(y) + x)
        return z


class Attention(nn.Module):
    def __init__(self, config: Blip2QFormerConfig, seen_width: int) -> None:
        super().__init__()
        self.attention = Heads(config, seen_width)
        self.output = Output(config, config.hidden_size)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        y: Tensor = self.output(self.attention(x, seen), x)
        return y


class Intermediate(nn.Module):
    def __init__(self, config: Blip2QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = activation(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.intermediate_act_fn(self.dense(x))
        return y


class QFormerLayer(nn.Module):
    def __init__(self, config: Blip2QFormerConfig, *, looks: bool) -> None:
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        self.crossattention = Attention(config, config.encoder_hidden_size) if looks else None
        self.intermediate_query = Intermediate(config)
        self.output_query = Output(config, config.intermediate_size)

    def forward(self, x: Tensor, patches: Tensor) -> Tensor:
        """[B, queries, width], [B, tokens, vision width] -> [B, queries, width]."""
        x = self.attention(x, x)
        if self.crossattention is not None:
            x = self.crossattention(x, patches)
        y: Tensor = self.output_query(self.intermediate_query(x), x)
        return y


class QFormerEncoder(nn.Module):
    def __init__(self, config: Blip2QFormerConfig) -> None:
        super().__init__()
        every = config.cross_attention_frequency
        self.layer = nn.ModuleList(
            QFormerLayer(config, looks=number % every == 0)
            for number in range(config.num_hidden_layers)
        )

    def __iter__(self) -> Iterator[QFormerLayer]:
        return cast("Iterator[QFormerLayer]", iter(self.layer))


class QFormer(nn.Module):
    def __init__(self, config: Blip2QFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = QFormerEncoder(config)

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        """[B, queries, width], [B, tokens, vision width] -> [B, queries, width].

        In the dtype of the weights.
        """
        dtype = self.layernorm.weight.dtype
        x: Tensor = self.layernorm(queries.to(dtype))
        patches = patches.to(dtype)
        for layer in self.encoder:
            x = layer(x, patches)
        return x
