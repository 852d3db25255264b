"""Attention of one token of each sequence over the KV's rows as they lie.

A step reads every row that its sequences have, once, and little else: memory is what it takes time
for. torch has no product that follows a table of rows, and gathering them first costs more than
attention itself (DESIGN.md).
"""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Callable, Sequence

import numba
import numpy as np
import torch
from numba import types
from numpy.typing import NDArray
from torch import Tensor

from blip2_serve.compute.cpu.compiler import BITS, Bits, bits, compiled, converters, threads


def last_tokens(tables: Sequence[array[int]], kv: Tensor) -> Callable[[int, Tensor], Tensor]:
    """The last token of each table of KV rows; `kv` is [layers, 2, rows, heads, head_dim].

    The result of a layer is good until the next one.
    """
    attend_layer = kernel(kv.dtype, kv.shape[4])
    ends = np.cumsum([0, *map(len, tables)])
    rows = np.concatenate([np.frombuffer(table, np.int64) for table in tables])
    layers = bits(kv)
    out = torch.empty((len(tables), *kv.shape[3:]), dtype=kv.dtype)
    out_bits = bits(out)
    in_parallel = threads()

    def attend(layer: int, qkv: Tensor) -> Tensor:
        keys, values = layers[layer]
        attend_layer(bits(qkv), keys, values, rows, ends, in_parallel, out_bits)
        return out

    return attend


@functools.cache
def kernel(dtype: torch.dtype, head_dim: int) -> Callable[..., None]:
    """The compiled `attend`."""
    widen, narrow = converters(dtype)
    scale = np.float32(head_dim**-0.5)

    def attend(
        qkv: Bits,  # [sequences, 3, heads, head_dim]
        keys: Bits,  # [rows, heads, head_dim]
        values: Bits,
        rows: NDArray[np.int64],  # of all sequences, one after the other
        ends: NDArray[np.int64],  # where each begins in `rows`, and where the last one ends
        threads: int,
        out: Bits,  # [sequences, heads, head_dim]
    ) -> None:
        sequences, _, heads, _ = qkv.shape
        # Few sequences share out their heads as well, or some threads would have nothing to do.
        parts = min(heads, -(-threads // sequences))
        longest = 0
        for sequence in range(sequences):
            longest = max(longest, ends[sequence + 1] - ends[sequence])
        for thread in numba.prange(threads):
            query = np.empty((heads, head_dim), np.float32)
            weights = np.empty((heads, longest), np.float32)
            for item in range(thread, sequences * parts, threads):
                sequence, part = item // parts, item % parts
                first, last = heads * part // parts, heads * (part + 1) // parts
                table = rows[ends[sequence] : ends[sequence + 1]]
                row = table[-1]
                for head in range(first, last):
                    for i in range(head_dim):
                        query[head, i] = widen(qkv[sequence, 0, head, i]) * scale
                        keys[row, head, i] = qkv[sequence, 1, head, i]
                        values[row, head, i] = qkv[sequence, 2, head, i]
                for t in range(len(table)):
                    row = table[t]  # here, not below: the compiler would read it every time
                    for head in range(first, last):
                        score = np.float32(0)
                        for i in range(head_dim):
                            score += query[head, i] * widen(keys[row, head, i])
                        weights[head, t] = score
                for head in range(first, last):
                    highest = weights[head, 0]
                    for t in range(len(table)):
                        highest = max(highest, weights[head, t])
                    total = np.float32(0)
                    for t in range(len(table)):
                        weights[head, t] = math.exp(weights[head, t] - highest)
                        total += weights[head, t]
                    for t in range(len(table)):
                        weights[head, t] /= total
                attended = query
                attended[first:last] = 0
                for t in range(len(table)):
                    row = table[t]
                    for head in range(first, last):
                        weight = weights[head, t]
                        for i in range(head_dim):
                            attended[head, i] += weight * widen(values[row, head, i])
                for head in range(first, last):
                    for i in range(head_dim):
                        out[sequence, head, i] = narrow(attended[head, i])

    kind = BITS[dtype][1]
    signature = types.void(
        kind[:, :, :, ::1],
        kind[:, :, ::1],
        kind[:, :, ::1],
        types.int64[::1],
        types.int64[::1],
        types.int64,
        kind[:, :, ::1],
    )
    return compiled(attend, signature, reordered=True)
