"""Linear layers with int8 weights by AVX512's dot products of bytes (vpdpbusd), for any rows.

At few rows half the bytes of bfloat16 are half the time. Only weights are rounded to 8 bits: each
row of activations is divided by its largest number and becomes 16-bit integers, and these two rows
of bytes, high and low, which share one pass over the weights. Sums of integers are exact, so a
row's result is the same to the last bit whatever rows it is computed with.

A tile is up to TILE_ROWS rows of activations by BLOCK outputs. Weights lie as tiles want them, for
each block of outputs four inputs of each one after the other: [blocks, inputs / 4, BLOCK, 4].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from blip2_serve.compute.cpu.compiler import BITS, BFloat16Type, bits, compiled, converters, threads
from blip2_serve.compute.cpu.vectors import (
    BYTES,
    FLOAT,
    FLOATS,
    LANES,
    WORD,
    WORDS,
    aligned,
    at,
    at_least,
    everywhere,
    instruction,
    load,
    loop,
    number,
    one_of,
    store,
    zeros,
)

TILE_ROWS = 6
BLOCK = 2 * LANES

# An activation is an integer up to _LARGEST, stored with _ZERO added: two bytes without a sign.
_LARGEST, _ZERO, _BASE = 32767, 32768, 256
_SMALLEST = 1e-30  # a row with nothing above counts as zeros: float32 could not divide by its unit

_NUMBERS = {torch.float32: FLOATS, torch.bfloat16: ir.VectorType(BFloat16Type(), LANES)}


@dataclass(frozen=True)
class Weight:
    """An int8 weight as the kernel reads it."""

    tiles: Tensor  # int8 [blocks, inputs / 4, BLOCK, 4]
    scales: Tensor  # float32 [outputs]: what an integer of a channel stands for
    sums: Tensor  # int32 [outputs]: of each channel's integers, times _ZERO / _BASE


def available() -> bool:
    """Whether this CPU has the instruction."""
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512vnni"))


def fits(weight: Tensor) -> bool:
    """Whether the kernel takes weights of this shape."""
    outputs, inputs = weight.shape
    return outputs % BLOCK == 0 and inputs % LANES == 0


def packed(weight: Tensor, scales: Tensor) -> Weight:
    """int8 [outputs, inputs], of a shape that fits, and float32 [outputs] -> for the kernel."""
    outputs, inputs = weight.shape
    tiles = aligned((outputs // BLOCK, inputs // 4, BLOCK, 4), torch.int8)
    tiles.copy_(weight.view(outputs // BLOCK, BLOCK, inputs // 4, 4).transpose(1, 2))
    sums = weight.sum(1, dtype=torch.int32) * (_ZERO // _BASE)
    return Weight(tiles, scales.float().contiguous(), sums)


def linear(x: Tensor, weight: Weight, bias: Tensor, *, relu: bool = False) -> Tensor:
    """float32 or bfloat16 [rows, inputs] -> the same [rows, outputs]; float32 bias [outputs]."""
    x = x.contiguous()
    blocks = len(weight.tiles)
    out = x.new_empty((len(x), blocks * BLOCK))
    kernel(x.dtype)(
        bits(x),
        weight.tiles.data_ptr(),
        weight.scales.data_ptr(),
        weight.sums.data_ptr(),
        bias.data_ptr(),
        out.data_ptr(),
        blocks,
        0.0 if relu else -torch.inf,
        threads(),
    )
    return out


@functools.cache
def kernel(dtype: torch.dtype) -> Callable[..., None]:
    """The compiled product for activations of this dtype; all arguments but these are addresses."""
    widen, _ = converters(dtype)
    tile_of, digits_of = _tiles(dtype), _digits(dtype)
    size = dtype.itemsize

    def multiply(
        x: NDArray[Any],
        weight: int,
        scales: int,
        sums: int,
        bias: int,
        out: int,
        blocks: int,
        least: float,
        threads: int,
    ) -> None:
        rows, inputs = x.shape
        out_row = blocks * BLOCK * size
        tiles = -(-rows // TILE_ROWS)
        for thread in numba.prange(threads):
            # Each thread makes all digits for itself: it costs less than waiting for the others.
            high = np.empty((rows, inputs), np.uint8)
            low = np.empty((rows, inputs), np.uint8)
            units = np.empty(rows, np.float32)
            for row in range(rows):
                largest = np.float32(0)
                nothing = np.float32(0)
                for i in range(inputs):
                    value = widen(x[row, i])
                    largest = max(largest, abs(value))
                    nothing += value * np.float32(0)  # unless there is one that is no number
                units[row] = largest / np.float32(_LARGEST) + nothing
                if largest > _SMALLEST and largest < math.inf:
                    digits_of(
                        x.ctypes.data + row * inputs * size,
                        high.ctypes.data + row * inputs,
                        low.ctypes.data + row * inputs,
                        np.float32(_LARGEST) / largest,
                        inputs,
                    )
                else:
                    high[row] = _ZERO // _BASE
                    low[row] = 0
            for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
                for tile in range(tiles):
                    first, last = rows * tile // tiles, rows * (tile + 1) // tiles
                    tile_of(
                        last - first,
                        high.ctypes.data + first * inputs,
                        low.ctypes.data + first * inputs,
                        units.ctypes.data + first * 4,
                        weight + block * BLOCK * inputs,
                        scales + block * BLOCK * 4,
                        sums + block * BLOCK * 4,
                        bias + block * BLOCK * 4,
                        out + first * out_row + block * BLOCK * size,
                        inputs // 4,
                        out_row,
                        least,
                    )

    signature = types.void(BITS[dtype][1][:, ::1], *[types.int64] * 6, types.float32, types.int64)
    return compiled(multiply, signature, reordered=True)


def _digits(dtype: torch.dtype) -> Any:
    """For use in a kernel: a function that makes the digits of a row.

    Its arguments: addresses of the row, of its high and of its low bytes; what to multiply the row
    by; the number of inputs.
    """
    numbers, integers = _NUMBERS[dtype], ir.VectorType(ir.IntType(8), LANES)

    @intrinsic  # type: ignore[untyped-decorator]
    def digits_of(_context: Any, x: Any, high: Any, low: Any, inverse: Any, inputs: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            x, high, low, inverse, inputs = args
            nearest = instruction(builder, "llvm.rint.v16f32", FLOATS, [FLOATS])
            factor = everywhere(builder, inverse)
            zero, shift = (everywhere(builder, WORD(value)) for value in (_ZERO, 8))

            def convert(i: Any, _sums: list[Any]) -> list[Any]:
                offset = builder.mul(i, number(LANES))
                address = at(builder, x, builder.mul(offset, number(dtype.itemsize)))
                value = load(builder, numbers, address, dtype.itemsize)
                if numbers != FLOATS:
                    value = builder.fpext(value, FLOATS)
                scaled = builder.call(nearest, [builder.fmul(value, factor)])
                digits = builder.add(builder.fptosi(scaled, WORDS), zero)
                for place, byte in ((low, digits), (high, builder.lshr(digits, shift))):
                    store(builder, builder.trunc(byte, integers), at(builder, place, offset), 1)
                return []

            loop(builder, builder.sdiv(inputs, number(LANES)), [], convert)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3, types.float32, types.int64), generate

    return digits_of


def _tiles(dtype: torch.dtype) -> Any:
    """For use in a kernel: a function that computes 1 to TILE_ROWS rows by one block.

    Its arguments: the number of rows; addresses of the first row's high and low bytes and of its
    unit, the block's weights, scales, sums, biases and first results; the number of fours of
    inputs, the bytes from one row of results to the next, and the least result.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile_of(
        _context: Any,
        rows: Any,
        high: Any,
        low: Any,
        units: Any,
        weight: Any,
        scales: Any,
        sums: Any,
        bias: Any,
        out: Any,
        fours: Any,
        stride: Any,
        least: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            def rows_of(count: int) -> None:
                result = {"result_type": _NUMBERS[dtype], "result_bytes": LANES * dtype.itemsize}
                _rows(builder, count, *args[1:], **result)

            one_of(builder, args[0], TILE_ROWS, rows_of)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 11, types.float32), generate

    return tile_of


def _rows(
    builder: Any,
    rows: int,
    high: Any,
    low: Any,
    units: Any,
    weight: Any,
    scales: Any,
    sums: Any,
    bias: Any,
    out: Any,
    fours: Any,
    stride: Any,
    least: Any,
    *,
    result_type: Any,
    result_bytes: int,
) -> None:
    fours_type = ir.VectorType(ir.IntType(8), BYTES)
    dot = instruction(
        builder, "llvm.x86.avx512.vpdpbusd.512", WORDS, [WORDS, fours_type, fours_type]
    )
    vectors = range(BLOCK // LANES)
    row_bytes = builder.mul(fours, number(4))
    digits = [
        at(builder, byte, builder.mul(row_bytes, number(row)))
        for row in range(rows)
        for byte in (high, low)
    ]

    def add_four(four: Any, totals: list[Any]) -> list[Any]:
        line = at(builder, weight, builder.mul(four, number(4 * BLOCK)))
        weights = [
            load(builder, fours_type, at(builder, line, number(BYTES * v)), BYTES) for v in vectors
        ]
        offset = builder.mul(four, number(4))
        new: list[Any] = []
        for digit in digits:
            inputs = everywhere(builder, load(builder, WORD, at(builder, digit, offset), 4))
            inputs = builder.bitcast(inputs, fours_type)
            new += [builder.call(dot, [totals[len(new) + v], inputs, weights[v]]) for v in vectors]
        return new

    totals = loop(builder, fours, [zeros(WORDS)] * len(digits) * len(vectors), add_four)
    floor = everywhere(builder, least)
    base = everywhere(builder, ir.Constant(FLOAT, float(_BASE)))
    for v in vectors:
        zero, scale, offset = (
            load(builder, kind, at(builder, address, number(BYTES * v)), 4)
            for kind, address in ((WORDS, sums), (FLOATS, scales), (FLOATS, bias))
        )
        for row in range(rows):
            upper, lower = (totals[(2 * row + digit) * len(vectors) + v] for digit in range(2))
            upper = builder.sitofp(builder.sub(upper, zero), FLOATS)
            result = builder.fadd(builder.fmul(upper, base), builder.sitofp(lower, FLOATS))
            unit = load(builder, FLOAT, at(builder, units, number(4 * row)), 4)
            result = builder.fmul(builder.fmul(result, scale), everywhere(builder, unit))
            result = at_least(builder, builder.fadd(result, offset), floor)
            if result_type != FLOATS:
                result = builder.fptrunc(result, result_type)
            place = at(builder, out, builder.mul(stride, number(row)))
            store(builder, result, at(builder, place, number(v * result_bytes)), 2)
