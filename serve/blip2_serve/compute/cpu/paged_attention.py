"""Attention of one token of each sequence over its KV slots, wherever they are.

A step reads every slot of its sequences once, and little else, so memory sets its time. torch has
no product that follows a list of slots, and gathering them first costs more than attention itself
(docs/lab/2026-11-cpu-kernels.md).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numba
import numpy as np
import torch
from numba import types
from numpy.typing import NDArray
from torch import Tensor

from blip2_serve.compute.cpu.compiler import compiled, part, threads
from blip2_serve.compute.cpu.formats import Bits, bits, format_of

Slots = NDArray[np.int64]


def attend_decode(slots: Sequence[Slots], kv: Tensor) -> Callable[[int, Tensor], Tensor]:
    """Prepares a step for the last token of each sequence, given each sequence's slots.

    `kv` is [layers, 2 (keys, values), slots, heads, head_dim]. The returned function computes one
    layer from its number and the tokens' [sequences, 3 (query, key, value), heads, head_dim]: it
    writes keys and values to each sequence's last slot, and returns [sequences, heads, head_dim],
    which the next call overwrites.
    """
    attend_layer = kernel(kv.dtype, kv.shape[4])
    ends = np.cumsum([0, *map(len, slots)])
    joined = np.concatenate(slots)
    layers = bits(kv)
    out = torch.empty((len(slots), *kv.shape[3:]), dtype=kv.dtype)
    out_bits = bits(out)
    in_parallel = threads()

    def attend(layer: int, qkv: Tensor) -> Tensor:
        keys, values = layers[layer]
        attend_layer(bits(qkv), keys, values, joined, ends, in_parallel, out_bits)
        return out

    return attend


@functools.cache
def kernel(
    dtype: torch.dtype, head_dim: int
) -> Callable[[Bits, Bits, Bits, Slots, Slots, int, Bits], None]:
    """The compiled attention of one layer."""
    attend_heads = _attend_heads(dtype, head_dim)

    def attend(
        qkv: Bits,  # [sequences, 3, heads, head_dim]
        keys: Bits,  # [slots, heads, head_dim]
        values: Bits,
        slots: Slots,  # of all sequences, one after the other
        ends: Slots,  # where each sequence begins in `slots`, and where the last one ends
        threads: int,
        out: Bits,  # [sequences, heads, head_dim]
    ) -> None:
        sequences, _, heads, _ = qkv.shape
        # A few sequences share out their heads as well, or some threads would have nothing to do.
        parts = min(heads, -(-threads // sequences))
        for thread in numba.prange(threads):
            for item in range(thread, sequences * parts, threads):
                sequence, part = item // parts, item % parts
                attend_heads(
                    heads * part // parts,
                    heads * (part + 1) // parts,
                    qkv[sequence],
                    keys,
                    values,
                    slots[ends[sequence] : ends[sequence + 1]],
                    out[sequence],
                )

    element = format_of(dtype).type
    signature = types.void(
        element[:, :, :, ::1],
        element[:, :, ::1],
        element[:, :, ::1],
        types.int64[::1],
        types.int64[::1],
        types.int64,
        element[:, :, ::1],
    )
    return compiled(attend, signature, variant=(str(dtype), head_dim), reordered=True)


def _attend_heads(
    dtype: torch.dtype, head_dim: int
) -> Callable[[int, int, Bits, Bits, Bits, Slots, Bits], None]:
    """For kernels: attention of one sequence's last token in the heads from `first` to `last`."""
    widen, narrow = format_of(dtype).widen, format_of(dtype).narrow
    scale = np.float32(head_dim**-0.5)
    softmax = part(_softmax, reordered=True)

    def attend_heads(
        first: int,
        last: int,
        qkv: Bits,  # [3, heads, head_dim]
        keys: Bits,
        values: Bits,
        slots: Slots,
        out: Bits,  # [heads, head_dim]
    ) -> None:
        heads = qkv.shape[1]
        # Here, or the compiler would have to find out whether they overlap with keys and values.
        query = np.empty((heads, head_dim), np.float32)
        weights = np.empty((heads, len(slots)), np.float32)
        slot = slots[-1]
        for head in range(first, last):
            for i in range(head_dim):
                query[head, i] = widen(qkv[0, head, i]) * scale
                keys[slot, head, i] = qkv[1, head, i]
                values[slot, head, i] = qkv[2, head, i]
        for position in range(len(slots)):
            slot = slots[position]  # here, or the compiler would read it in the innermost loop
            for head in range(first, last):
                score = np.float32(0)
                for i in range(head_dim):
                    score += query[head, i] * widen(keys[slot, head, i])
                weights[head, position] = score
        for head in range(first, last):
            softmax(weights[head])
        attended = query
        attended[first:last] = 0
        for position in range(len(slots)):
            slot = slots[position]
            for head in range(first, last):
                weight = weights[head, position]
                for i in range(head_dim):
                    attended[head, i] += weight * widen(values[slot, head, i])
        for head in range(first, last):
            for i in range(head_dim):
                out[head, i] = narrow(attended[head, i])

    return part(attend_heads, reordered=True)


def _softmax(scores: NDArray[np.float32]) -> None:
    """In place; the largest score is subtracted first, or the exponentials might overflow."""
    highest = scores[0]
    for i in range(len(scores)):
        highest = max(highest, scores[i])
    total = np.float32(0)
    for i in range(len(scores)):
        scores[i] = math.exp(scores[i] - highest)
        total += scores[i]
    for i in range(len(scores)):
        scores[i] /= total
