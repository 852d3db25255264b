"""Attention of a step in which sequences advance by any number of tokens, written in Triton.

A sequence's tokens of this step are a chunk: a whole prompt, the rest of one behind a cached
prefix, or a single token. Each program computes one head of up to `QUERIES` tokens of one chunk. It
reads earlier tokens' keys and values from their KV slots and the chunk's own from `qkv`, and writes
its own tokens' into their slots. No program reads what another writes, so one launch serves the
whole step. What a program does is read from GPU memory: a CUDA graph fits any chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tokens per program. A tensor core's tile has 16 rows; most prompts are short.
QUERIES = 16
# (keys per block, warps per program, pipeline stages)
SHAPE = (32, 2, 2)

# A row of `blocks`: index of its first token, number of tokens, position of the first, position
# where the chunk starts, index of the chunk.
BLOCK_FIELDS = 5


def blocks_of(spans: list[tuple[int, int]]) -> list[tuple[int, int, int, int, int]]:
    """The programs' work for chunks that go from one position to another, end to end."""
    blocks, offset = [], 0
    for chunk, (start, end) in enumerate(spans):
        blocks += [
            (offset + first - start, min(QUERIES, end - first), first, start, chunk)
            for first in range(start, end, QUERIES)
        ]
        offset += end - start
    return blocks


def attend(qkv: Tensor, kv: Tensor, blocks: Tensor, slots: Tensor) -> Tensor:
    """Attends from each token to itself and all tokens of its sequence before it.

    Args:
        qkv: [tokens, 3, heads, head_dim], queries, keys and values of the step's tokens.
        kv: [2, slots, heads, head_dim], one layer of the KV cache; the new keys and values are
            written into it.
        blocks: int64 [any, BLOCK_FIELDS], see `blocks_of`; a row of zeros does nothing.
        slots: int64 [chunks, any], the KV slot of each position of the chunk's sequence.

    Returns:
        [tokens, heads, head_dim] in the dtype of `qkv`, undefined where no block has a token.
        Sums are computed in float32.
    """
    tokens, _, heads, dim = qkv.shape
    keys_per_block, warps, stages = SHAPE
    out = torch.empty((tokens, heads, dim), dtype=qkv.dtype, device=qkv.device)
    _kernel[len(blocks), heads](
        out,
        qkv,
        *kv,
        blocks,
        blocks.stride(0),
        slots,
        slots.stride(0),
        dim**-0.5,
        heads=heads,
        dim=dim,
        padded_dim=max(16, triton.next_power_of_2(dim)),  # a tensor core's least
        queries=QUERIES,
        block=keys_per_block,
        stages=stages,
        num_warps=warps,
    )
    return out


def _mix_block(  # type: ignore[no-untyped-def]
    query, block_keys, block_values, seen, scale, largest, total, mixed
):
    """Adds a block of keys and values to a softmax in one pass, which rescales its sums."""
    scores = scale * tl.dot(query, tl.trans(block_keys), input_precision="ieee")
    scores = tl.where(seen, scores, float("-inf"))
    larger = tl.maximum(largest, tl.max(scores, 1))
    shrink = tl.exp(largest - larger)
    weights = tl.exp(scores - larger[:, None])
    total = total * shrink + tl.sum(weights, 1)
    added = tl.dot(weights.to(block_values.dtype), block_values, input_precision="ieee")
    return larger, total, mixed * shrink[:, None] + added


_mix = triton.jit(_mix_block)


def _attend(  # type: ignore[no-untyped-def]  # Triton reads annotations
    out,
    qkv,
    keys,
    values,
    blocks,
    blocks_stride,
    slots,
    slots_stride,
    scale,
    heads: tl.constexpr,
    dim: tl.constexpr,
    padded_dim: tl.constexpr,
    queries: tl.constexpr,
    block: tl.constexpr,
    stages: tl.constexpr,
):
    work = blocks + tl.program_id(0) * blocks_stride
    head = tl.program_id(1)
    first = tl.load(work)
    count = tl.load(work + 1)
    position = tl.load(work + 2)
    start = tl.load(work + 3)
    own_slots = slots + tl.load(work + 4) * slots_stride
    dims = tl.arange(0, padded_dim)
    inside = dims < dim
    lines = tl.arange(0, queries)
    valid = (lines < count)[:, None] & inside[None, :]
    own = qkv + ((first + lines)[:, None] * 3 * heads + head) * dim + dims[None, :]
    query = tl.load(own, valid, 0)
    line_slots = tl.load(own_slots + position + lines, lines < count, 0)
    places = (line_slots[:, None] * heads + head) * dim + dims[None, :]
    tl.store(keys + places, tl.load(own + heads * dim, valid, 0), valid)
    tl.store(values + places, tl.load(own + 2 * heads * dim, valid, 0), valid)
    largest = tl.full((queries,), float("-inf"), tl.float32)
    total = tl.zeros((queries,), tl.float32)
    mixed = tl.zeros((queries, padded_dim), tl.float32)
    for before in tl.range(0, start, block, num_stages=stages):
        key_positions = before + tl.arange(0, block)
        cached = key_positions < start
        cached_slots = tl.load(own_slots + key_positions, cached, 0)
        sources = (cached_slots[:, None] * heads + head) * dim + dims[None, :]
        wanted = cached[:, None] & inside[None, :]
        block_keys = tl.load(keys + sources, wanted, 0)
        block_values = tl.load(values + sources, wanted, 0)
        seen = cached[None, :] & (lines >= 0)[:, None]
        largest, total, mixed = _mix(
            query, block_keys, block_values, seen, scale, largest, total, mixed
        )
    earlier = position - start  # tokens of the chunk before this program's
    chunk = qkv + ((first - earlier) * 3 * heads + head) * dim
    for before in tl.range(0, earlier + count, block, num_stages=stages):
        indices = before + tl.arange(0, block)
        known = indices < earlier + count
        sources = indices[:, None] * 3 * heads * dim + dims[None, :]
        wanted = known[:, None] & inside[None, :]
        block_keys = tl.load(chunk + heads * dim + sources, wanted, 0)
        block_values = tl.load(chunk + 2 * heads * dim + sources, wanted, 0)
        seen = known[None, :] & (indices[None, :] <= (earlier + lines)[:, None])
        largest, total, mixed = _mix(
            query, block_keys, block_values, seen, scale, largest, total, mixed
        )
    results = out + ((first + lines)[:, None] * heads + head) * dim + dims[None, :]
    # The largest score's weight is 1; only a block that does nothing has no sum.
    tl.store(results, mixed / tl.maximum(total, 1.0)[:, None], valid)


_kernel = triton.jit(_attend)
