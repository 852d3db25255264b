"""Attention among an image's tokens, written in Triton for head sizes such as the ViT's 88.

Tensor cores take head sizes that are powers of 2, and 128 is half as much again as 88. So the heads
are split: 64 and 24, which is padded to 32. Queries, keys and values are read where their product
left them, and the result is written as the next product wants it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
DTYPES = (torch.bfloat16, torch.float16)
SMALLEST = 16  # of what tensor cores multiply


class Size(NamedTuple):
    """Of a program."""

    queries: int  # tokens it computes
    keys: int  # tokens that they attend to at once
    warps: int
    stages: int  # blocks of keys on their way at once
    registers: int | None = None  # most per thread; 128 let two programs of 8 warps share an SM


FOR_FEW, FOR_MANY = Size(64, 64, 4, 2), Size(128, 64, 8, 2, 128)


def supported(qkv: Tensor, heads: int) -> bool:
    return qkv.dtype in DTYPES and qkv.shape[1] // (3 * heads) >= SMALLEST


def attend(qkv: Tensor, images: int, heads: int) -> Tensor:
    """[images * tokens, 3 * heads * head_dim] -> [images * tokens, heads * head_dim].

    Every token attends to all tokens of its image. `qkv` must be contiguous and `supported`.
    """
    rows, width = qkv.shape[0], qkv.shape[1] // 3
    tokens, dim = rows // images, width // heads
    first = 1 << (dim.bit_length() - 1)  # the largest power of 2 in it
    rest = max(SMALLEST, triton.next_power_of_2(dim - first)) if dim > first else 0
    size = FOR_FEW if images == 1 else FOR_MANY
    out = qkv.new_empty(rows, width)
    _kernel[(triton.cdiv(tokens, size.queries), heads, images)](
        out,
        qkv,
        tokens,
        dim**-0.5 * LOG2_E,
        heads=heads,
        dim=dim,
        first=first,
        rest=rest,
        queries=size.queries,
        keys=size.keys,
        stages=size.stages,
        num_warps=size.warps,
        maxnreg=size.registers,
    )
    return out


def _add_block(  # type: ignore[no-untyped-def]  # Triton reads annotations
    sum1,
    sum2,
    largest,
    total,
    query1,
    query2,
    keys,
    start,
    tokens,
    factor,
    stride: tl.constexpr,
    dim: tl.constexpr,
    first: tl.constexpr,
    rest: tl.constexpr,
    count: tl.constexpr,
    whole: tl.constexpr,
):
    """Attends to `count` tokens from `start` on, of which all exist if `whole`."""
    rows = start + tl.arange(0, count)
    exists = rows[:, None] < tokens
    columns1 = tl.arange(0, first)
    places1 = keys + rows[:, None] * stride + columns1[None, :]
    values = stride // 3
    if whole:
        key1 = tl.load(places1)
        value1 = tl.load(places1 + values)
    else:
        key1 = tl.load(places1, exists, 0.0)
        value1 = tl.load(places1 + values, exists, 0.0)
    scores = tl.dot(query1, key1.T)
    if rest > 0:
        columns2 = first + tl.arange(0, rest)
        places2 = keys + rows[:, None] * stride + columns2[None, :]
        inside = columns2[None, :] < dim
        if not whole:
            inside = inside & exists
        scores = tl.dot(query2, tl.load(places2, inside, 0.0).T, scores)
    if not whole:
        scores = tl.where(rows[None, :] < tokens, scores, -float("inf"))
    next_largest = tl.maximum(largest, tl.max(scores, 1) * factor)
    weights = tl.exp2(scores * factor - next_largest[:, None])
    shrink = tl.exp2(largest - next_largest)
    total = total * shrink + tl.sum(weights, 1)
    rounded = weights.to(query1.dtype)
    sum1 = tl.dot(rounded, value1, sum1 * shrink[:, None])
    if rest > 0:
        value2 = tl.load(places2 + values, inside, 0.0)
        sum2 = tl.dot(rounded, value2, sum2 * shrink[:, None])
    return sum1, sum2, next_largest, total


_block = triton.jit(_add_block)


def _attend(  # type: ignore[no-untyped-def]
    out,
    qkv,
    tokens,
    factor,
    heads: tl.constexpr,
    dim: tl.constexpr,
    first: tl.constexpr,
    rest: tl.constexpr,
    queries: tl.constexpr,
    keys: tl.constexpr,
    stages: tl.constexpr,
):
    width: tl.constexpr = heads * dim
    stride: tl.constexpr = 3 * width
    image = tl.program_id(2).to(tl.int64) * tokens
    head = tl.program_id(1) * dim
    rows = tl.program_id(0) * queries + tl.arange(0, queries)
    exists = rows[:, None] < tokens
    columns1 = tl.arange(0, first)
    own = qkv + image * stride + head
    query1 = tl.load(own + rows[:, None] * stride + columns1[None, :], exists, 0.0)
    sum1 = tl.zeros((queries, first), tl.float32)
    query2, sum2 = query1, sum1
    if rest > 0:
        columns2 = first + tl.arange(0, rest)
        inside = exists & (columns2[None, :] < dim)
        query2 = tl.load(own + rows[:, None] * stride + columns2[None, :], inside, 0.0)
        sum2 = tl.zeros((queries, rest), tl.float32)
    largest = tl.full((queries,), -float("inf"), tl.float32)
    total = tl.zeros((queries,), tl.float32)
    whole = tokens // keys * keys
    for start in tl.range(0, whole, keys, num_stages=stages):
        sum1, sum2, largest, total = _block(
            sum1, sum2, largest, total, query1, query2, own + width, start, tokens, factor,
            stride, dim, first, rest, keys, True,
        )  # fmt: skip
    if whole < tokens:
        sum1, sum2, largest, total = _block(
            sum1, sum2, largest, total, query1, query2, own + width, whole, tokens, factor,
            stride, dim, first, rest, keys, False,
        )  # fmt: skip
    places = out + image * width + head + rows[:, None] * width
    tl.store(places + columns1[None, :], sum1 / total[:, None], exists)
    if rest > 0:
        tl.store(places + columns2[None, :], sum2 / total[:, None], inside)


_kernel = triton.jit(_attend)
