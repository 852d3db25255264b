"""Paged attention for decode steps on a GPU, written in Triton: one query per sequence.

Each program computes one head of one sequence: it writes the new token's key and value into its KV
slot and reads every earlier key and value once, in place. It loads the sequence's length from GPU
memory, so one CUDA graph fits sequences of any length. torch's attention cannot follow slot
numbers and takes two to five times as long for a single query (docs/lab/2026-11-gpu.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from blip2_serve.compute.cuda import overlap as overlapping

# (keys per block, warps per program, pipeline stages), as measured
FOR_FEW = (64, 4, 2)
FOR_MANY = (16, 1, 2)
MANY = 512  # programs that keep a GPU's memory busy even if each is small


def attend(qkv: Tensor, kv: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
    """Attends from one token of each sequence to itself and all tokens before it.

    Args:
        qkv: [n, 3, heads, head_dim], the new tokens' queries, keys and values.
        kv: [2, slots, heads, head_dim], one layer of the KV cache; the new keys and values are
            written into it.
        slots: int64 [n, any]; the KV slot of each position up to the token's own. The rest of a
            row is ignored.
        positions: int64 [n], the new tokens' positions.

    Returns:
        [n, heads, head_dim] in the dtype of `qkv`; sums are computed in float32.
    """
    count, _, heads, dim = qkv.shape
    block, warps, stages = FOR_MANY if count * heads > MANY else FOR_FEW
    out = torch.empty((count, heads, dim), dtype=qkv.dtype, device=qkv.device)
    _kernel[count, heads](
        out,
        qkv,
        *kv,
        slots,
        slots.stride(0),
        positions,
        positions.stride(0),
        dim**-0.5,
        heads=heads,
        dim=dim,
        padded_dim=triton.next_power_of_2(dim),
        block=block,
        stages=stages,
        num_warps=warps,
        **overlapping.options(qkv.device),
    )
    return out


def _attend(  # type: ignore[no-untyped-def]  # Triton reads annotations
    out,
    qkv,
    keys,
    values,
    slots,
    slots_stride,
    positions,
    positions_stride,
    scale,
    heads: tl.constexpr,
    dim: tl.constexpr,
    padded_dim: tl.constexpr,
    block: tl.constexpr,
    stages: tl.constexpr,
    overlap: tl.constexpr,
):
    if overlap:
        gdc_launch_dependents()
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    own_slots = slots + sequence * slots_stride
    position = tl.load(positions + sequence * positions_stride)
    dims = tl.arange(0, padded_dim)
    inside = dims < dim
    own = qkv + (sequence * 3 * heads + head) * dim + dims
    if overlap:
        gdc_wait()
    query = tl.load(own, inside, 0).to(tl.float32) * scale
    key = tl.load(own + heads * dim, inside, 0)
    value = tl.load(own + 2 * heads * dim, inside, 0)
    place = (tl.load(own_slots + position) * heads + head) * dim + dims
    tl.store(keys + place, key, inside)
    tl.store(values + place, value, inside)
    # A softmax in one pass, which rescales its sums at each larger score. It starts with the
    # token's own.
    largest = tl.sum(query * key.to(tl.float32))
    total = 1.0
    mixed = value.to(tl.float32)
    for first in tl.range(0, position, block, num_stages=stages):
        block_positions = first + tl.arange(0, block)
        earlier = block_positions < position
        block_slots = tl.load(own_slots + block_positions, earlier, 0)
        places = (block_slots[:, None] * heads + head) * dim + dims[None, :]
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
