"""Attention of one token of each sequence on a GPU, over the KV's rows as they lie; in Triton.

A program computes one head of one sequence: it writes the token's key and value into its row, and
reads each earlier key and value once. How many there are it learns from memory, so that a CUDA
graph of it is good for sequences of any length. torch's attention follows no table of rows, and
takes two to five times as long for a single query (DESIGN.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# (keys that a program reads at once, its warps, blocks that are on their way): measured (DESIGN.md)
FOR_FEW = (64, 4, 2)
FOR_MANY = (16, 1, 2)
MANY = 512  # programs; enough to keep a GPU's memory busy with small ones


def attend(qkv: Tensor, kv: Tensor, tables: Tensor, starts: Tensor) -> Tensor:
    """[n, heads, head_dim], of the dtype of `qkv`; sums are float32.

    `qkv` is [n, 3, heads, head_dim] of tokens at positions `starts`, int64 [n]; `kv` is one
    layer's, [2, rows, heads, head_dim]; `tables`, int64 [n, any], has the row of each position up
    to the token's own, which is written. What lies behind it is not read.
    """
    count, _, heads, dim = qkv.shape
    block, warps, stages = FOR_MANY if count * heads > MANY else FOR_FEW
    out = torch.empty((count, heads, dim), dtype=qkv.dtype, device=qkv.device)
    _kernel[count, heads](
        out,
        qkv,
        *kv,
        tables,
        tables.stride(0),
        starts,
        starts.stride(0),
        dim**-0.5,
        heads=heads,
        dim=dim,
        padded_dim=triton.next_power_of_2(dim),
        block=block,
        stages=stages,
        num_warps=warps,
    )
    return out


def _attend(  # type: ignore[no-untyped-def]  # Triton reads annotations
    out,
    qkv,
    keys,
    values,
    tables,
    table_stride,
    starts,
    start_stride,
    scale,
    heads: tl.constexpr,
    dim: tl.constexpr,
    padded_dim: tl.constexpr,
    block: tl.constexpr,
    stages: tl.constexpr,
):
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    table = tables + sequence * table_stride
    start = tl.load(starts + sequence * start_stride)
    dims = tl.arange(0, padded_dim)
    inside = dims < dim
    own = qkv + (sequence * 3 * heads + head) * dim + dims
    query = tl.load(own, inside, 0).to(tl.float32) * scale
    key = tl.load(own + heads * dim, inside, 0)
    value = tl.load(own + 2 * heads * dim, inside, 0)
    place = (tl.load(table + start) * heads + head) * dim + dims
    tl.store(keys + place, key, inside)
    tl.store(values + place, value, inside)
    # A softmax in one pass: sums are rescaled when a larger score is met. The first is the own.
    largest = tl.sum(query * key.to(tl.float32))
    total = 1.0
    mixed = value.to(tl.float32)
    for first in tl.range(0, start, block, num_stages=stages):
        positions = first + tl.arange(0, block)
        earlier = positions < start
        rows = tl.load(table + positions, earlier, 0)
        places = (rows[:, None] * heads + head) * dim + dims[None, :]
        wanted = earlier[:, None] & inside[None, :]
        block_keys = tl.load(keys + places, wanted, 0).to(tl.float32)
        block_values = tl.load(values + places, wanted, 0).to(tl.float32)
        scores = tl.where(earlier, tl.sum(query[None, :] * block_keys, 1), float("-inf"))
        larger = tl.maximum(largest, tl.max(scores))
        shrink = tl.exp(largest - larger)
        weights = tl.exp(scores - larger)
        total = total * shrink + tl.sum(weights)
        mixed = mixed * shrink + tl.sum(weights[:, None] * block_values, 0)
        largest = larger
    tl.store(out + (sequence * heads + head) * dim + dims, mixed / total, inside)


_kernel = triton.jit(_attend)
