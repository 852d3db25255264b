"""Attention of one step, part by part: each part writes its keys and values, then looks at them.

Each function prepares what all layers share, and returns what computes one layer. None of them
knows why these tokens are computed together.

`kv_rows` is the KV, [layers, rows, 2 (keys, values), heads, head_dim]; `rows` are int64 indices
into it, on the device, in the order of the part's tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from blip2_serve.engine.slots import Block
from blip2_serve.model.opt import Attend


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


def over_blocks(blocks: list[Block], starts: list[int], kv_rows: Tensor, rows: Tensor) -> Attend:
    """One token of each sequence in slots, at column `starts`; on a CPU.

    By two matrix products for each block and a float32 softmax: for a single query, torch's fused
    attention takes twice as long on a CPU, and so does the first product the other way round
    (DESIGN.md).
    """
    count, width = len(starts), blocks[-1].end
    positions = torch.tensor(starts)
    slots = torch.arange(count)
    last = []  # block of a sequence's own token, the sequences, their slots and columns there
    for block, next_count in zip(blocks, [*(b.count for b in blocks[1:]), 0], strict=True):
        if next_count < block.count:
            own = slice(next_count, block.count)
            last.append((block, own, slots[own], positions[own] - block.start))
    hidden = torch.arange(width) > positions[:, None, None]
    bias = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
    scores: Tensor | None = None  # of several blocks; where a sequence has none, zeros

    def attend(layer: int, qkv: Tensor) -> Tensor:
        nonlocal scores
        kv_rows[layer][rows] = qkv[:, 1:]
        for block, own, slot, column in last:
            block.kv[layer][:, slot, :, column] = qkv[own, 1:]
        heads, dim = qkv.shape[2:]
        query = qkv[:, 0].reshape(count * heads, dim, 1)
        products = [
            torch.bmm(block.kv[layer, 0, : block.count].flatten(0, 1), query[: block.count * heads])
            for block in blocks
        ]
        if len(blocks) == 1:
            scores = products[0].view(count, heads, width)
        else:
            if scores is None:
                scores = query.new_zeros(count, heads, width)
            for block, product in zip(blocks, products, strict=True):
                scores[: block.count, :, block.start : block.end] = product.view(
                    block.count, heads, -1
                )
        weights = torch.add(bias, scores, alpha=dim**-0.5).softmax(-1).to(qkv.dtype).flatten(0, 1)
        attended = [
            torch.bmm(
                weights[: block.count * heads, None, block.start : block.end],
                block.kv[layer, 1, : block.count].flatten(0, 1),
            )
            for block in blocks
        ]
        for more in attended[1:]:
            attended[0][: len(more)] += more
        return attended[0].view(count, heads, dim)

    return attend


def fused(kv: Tensor, starts: Tensor, width: int, kv_rows: Tensor, rows: Tensor) -> Attend:
    """One token of each of the first slots, at column `starts`, of which none reaches `width`.

    By torch's fused attention, for GPUs: three kernels a layer where the products take ten. `kv`
    is all the slots as one block, [layers, 2, slots, heads, columns, head_dim].
    """
    count, layers = len(starts), len(kv)
    slot = torch.arange(count, device=kv.device)
    hidden = torch.arange(width, device=kv.device) > starts[:, None, None, None]
    bias = torch.zeros(hidden.shape, dtype=kv.dtype, device=kv.device)
    bias.masked_fill_(hidden, -torch.inf)

    def attend(layer: int, qkv: Tensor) -> Tensor:
        kv[layer][:, slot, :, starts] = qkv[:, 1:]
        if layer == layers - 1:  # into the rows for all layers at once
            kv_rows[:, rows] = kv[:, :, slot, :, starts].transpose(0, 1)
        keys, values = kv[layer, :, :count, :, :width]
        attended = scaled_dot_product_attention(qkv[:, 0, :, None], keys, values, attn_mask=bias)
        return attended[:, :, 0]

    return attend


def beginnings(count: int, kv_rows: Tensor, rows: Tensor) -> Attend:
    """As many first tokens of `count` sequences, each looking at those up to its own."""

    def attend(layer: int, qkv: Tensor) -> Tensor:
        kv_rows[layer][rows] = qkv[:, 1:]
        query, key, value = qkv.unflatten(0, (count, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(query, key, value, is_causal=True)
        return attended.transpose(1, 2).flatten(0, 1)

    return attend


def continuation(start: int, kv_rows: Tensor, rows: Tensor) -> Attend:
    """Tokens of one sequence from `start` on, each looking at those up to its own.

    `rows` are those of all tokens, the earlier ones too.
    """
    positions = torch.arange(start, len(rows), device=rows.device)
    mask = torch.arange(len(rows), device=rows.device) <= positions[:, None]

    def attend(layer: int, qkv: Tensor) -> Tensor:
        kv_rows[layer][rows[start:]] = qkv[:, 1:]
        key, value = kv_rows[layer].index_select(0, rows).permute(1, 2, 0, 3)
        query = qkv[:, 0].transpose(0, 1)
        attended = scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=mask)
        return attended[0].transpose(0, 1)

    return attend
