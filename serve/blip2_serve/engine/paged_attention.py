"""Attention of one token of each sequence over the KV's rows as they lie, on a CPU.

A step reads every row that its sequences have, once, and little else: memory is what it takes time
for. torch has no product that follows a table of rows, and gathering them first costs more than
attention itself (DESIGN.md). numba compiles this one, for each dtype and head size that is served.
"""

from __future__ import annotations

import ctypes
import functools
import math
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from blip2_serve.model.opt import Attend

# The threads that torch computes with, where it can be: a second set would compete with them.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "workqueue", "tbb"]

_Bits = NDArray[Any]  # what numpy can hold of a tensor: 16-bit floats as integers
_BITS = {
    torch.float32: (torch.float32, types.float32),
    torch.bfloat16: (torch.int16, types.int16),
    torch.float16: (torch.int16, types.int16),
}


def last_tokens(tables: Sequence[array[int]], kv: Tensor) -> Attend:
    """The last token of each table of KV rows; `kv` is [layers, 2, rows, heads, head_dim].

    The result of a layer is good until the next one.
    """
    compiled = kernel(kv.dtype, kv.shape[4])
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    ends = np.cumsum([0, *map(len, tables)])
    rows = np.concatenate([np.frombuffer(table, np.int64) for table in tables])
    layers = _bits(kv)
    out = torch.empty((len(tables), *kv.shape[3:]), dtype=kv.dtype)
    out_bits = _bits(out)

    def attend(layer: int, qkv: Tensor) -> Tensor:
        keys, values = layers[layer]
        compiled(_bits(qkv), keys, values, rows, ends, threads, out_bits)
        return out

    return attend


@functools.cache
def kernel(dtype: torch.dtype, head_dim: int) -> Callable[..., None]:
    """The compiled `attend`; compiling takes some seconds, once in a process."""
    widen, narrow = _WIDEN[dtype], _NARROW[dtype]
    scale = np.float32(head_dim**-0.5)

    def attend(
        qkv: _Bits,  # [sequences, 3, heads, head_dim]
        keys: _Bits,  # [rows, heads, head_dim]
        values: _Bits,
        rows: NDArray[np.int64],  # of all sequences, one after the other
        ends: NDArray[np.int64],  # where each begins in `rows`, and where the last one ends
        threads: int,
        out: _Bits,  # [sequences, heads, head_dim]
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
                own = table[-1]
                for head in range(first, last):
                    for i in range(head_dim):
                        query[head, i] = widen(qkv[sequence, 0, head, i]) * scale
                        keys[own, head, i] = qkv[sequence, 1, head, i]
                        values[own, head, i] = qkv[sequence, 2, head, i]
                for t in range(len(table)):
                    row = table[t]
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

    bits = _BITS[dtype][1]
    signature = types.void(
        bits[:, :, :, ::1],
        bits[:, :, ::1],
        bits[:, :, ::1],
        types.int64[::1],
        types.int64[::1],
        types.int64,
        bits[:, :, ::1],
    )
    # Sums in any order, or a product could not use vector instructions.
    fast = {"reassoc", "contract", "nsz"}
    compiled: Callable[..., None] = numba.njit(signature, parallel=True, nogil=True, fastmath=fast)(
        attend
    )
    _start_threads()
    return compiled


def _start_threads() -> None:
    """Starts numba's threads, which are OpenMP's, and takes back what numba sets along with it.

    It allows parallel regions inside others. Then each product inside torch's fused attention,
    which is such a region, starts threads of its own and takes twice as long.
    """
    numba.set_num_threads(1)
    allow = getattr(ctypes.CDLL(None), "omp_set_max_active_levels", None)
    if allow:  # numba may have had to do without OpenMP
        allow(1)


def _bits(tensor: Tensor) -> _Bits:
    """The same memory for numpy."""
    bits: _Bits = tensor.view(_BITS[tensor.dtype][0]).numpy()
    return bits


# -- 16-bit floats, which numba does not compute with on a CPU ----------------------------------


@intrinsic  # type: ignore[untyped-decorator]
def _widen_bfloat16(_context: Any, _bits: Any) -> Any:
    """A bfloat16 is the upper half of a float32."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        word = builder.zext(args[0], ir.IntType(32))
        return builder.bitcast(builder.shl(word, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(types.int16), generate


@intrinsic  # type: ignore[untyped-decorator]
def _float32_bits(_context: Any, _number: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _narrow_bfloat16(number: Any) -> Any:
    """To the nearest, of two to the even one, as torch does."""
    bits = _float32_bits(np.float32(number))
    even = (bits >> np.uint32(16)) & np.uint32(1)
    return np.int16((bits + np.uint32(0x7FFF) + even) >> np.uint32(16))


@intrinsic  # type: ignore[untyped-decorator]
def _widen_float16(_context: Any, _bits: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), generate


@intrinsic  # type: ignore[untyped-decorator]
def _narrow_float16(_context: Any, _number: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), generate


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _as_it_is(number: Any) -> Any:
    return np.float32(number)


_WIDEN = {
    torch.float32: _as_it_is,
    torch.bfloat16: _widen_bfloat16,
    torch.float16: _widen_float16,
}
_NARROW = {
    torch.float32: _as_it_is,
    torch.bfloat16: _narrow_bfloat16,
    torch.float16: _narrow_float16,
}
