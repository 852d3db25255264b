"""Attention of one step, part by part: each part writes its keys and values, then looks at them.

Each function prepares what all layers share, and returns what computes one layer. None of them
knows why these tokens are computed together.

`kv` is the KV, [layers, 2 (keys, values), rows, heads, head_dim]; `rows` are int64 indices
into it, on the device, in the order of the part's tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from blip2_serve.model.decoder import Attend


def joined(parts: list[tuple[int, Attend]]) -> Attend:
    """Parts of so many tokens each, one after the other; tokens behind them get zeros."""
    joint: Tensor | None = None  # one for all layers

    def attend(layer: int, qkv: Tensor) -> Tensor:
        nonlocal joint
        if [count for count, _ in parts] == [len(qkv)]:
            return parts[0][1](layer, qkv)
        if joint is None:
            joint = torch.zeros_like(qkv[:, 0])
        offset = 0
        for count, part in parts:
            own = slice(offset, offset + count)
            joint[own] = part(layer, qkv[own])
            offset += count
        return joint

    return attend


def last_tokens(qkv: Tensor, kv: Tensor, tables: Tensor, starts: Tensor) -> Tensor:
    """`kernels.decode_attention.last_tokens` wherever torch runs: for tests, and slow."""
    own = tables.gather(1, starts[:, None])[:, 0]
    kv[:, own] = qkv[:, 1:].transpose(0, 1)
    seen = torch.arange(tables.shape[1], device=tables.device) <= starts[:, None]
    keys, values = kv[:, tables.where(seen, 0)].masked_fill(~seen[:, :, None, None], 0)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    mask = seen[:, None, None]
    attended = scaled_dot_product_attention(qkv[:, 0, :, None], keys, values, attn_mask=mask)
    return attended[:, :, 0]


def beginnings(count: int, kv: Tensor, rows: Tensor) -> Attend:
    """As many first tokens of `count` sequences, each looking at those up to its own."""

    def attend(layer: int, qkv: Tensor) -> Tensor:
        kv[layer][:, rows] = qkv[:, 1:].transpose(0, 1)
        query, key, value = qkv.unflatten(0, (count, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(query, key, value, is_causal=True)
        return attended.transpose(1, 2).flatten(0, 1)

    return attend


def continuation(start: int, kv: Tensor, rows: Tensor) -> Attend:
    """Tokens of one sequence from `start` on, each looking at those up to its own.

    `rows` are those of all tokens, the earlier ones too.
    """
    positions = torch.arange(start, len(rows), device=rows.device)
    mask = torch.arange(len(rows), device=rows.device) <= positions[:, None]

    def attend(layer: int, qkv: Tensor) -> Tensor:
        kv[layer][:, rows[start:]] = qkv[:, 1:].transpose(0, 1)
        key, value = kv[layer].index_select(1, rows).transpose(1, 2)
        query = qkv[:, 0].transpose(0, 1)
        attended = scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=mask)
        return attended[0].transpose(0, 1)

    return attend
