"""Linear layers with int8 weights by AVX512's dot products of bytes (vpdpbusd), for any rows.

At few rows memory sets the time, so half the bytes of bfloat16 take half of it. Only weights are
rounded to 8 bits: each row of activations is divided by its largest number and becomes 16-bit
integers. These are stored as two rows of bytes, its digits high and low, which share one pass over
the weights. Sums of integers are exact, so a row gives the same bits whatever rows it is computed
with.

A tile is up to TILE_ROWS rows of activations by BLOCK outputs. Weights lie in the order in which
tiles read them: for each block of outputs, four inputs of each output side by side,
[blocks, inputs / 4, BLOCK, 4].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import llvmlite.binding
import numba
import numpy as np
import torch
from numba import types
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from blip2_serve.compute.cpu.compiler import compiled, part, threads
from blip2_serve.compute.cpu.formats import Bits, aligned, bits, format_of
from blip2_serve.compute.cpu.simd import (
    BYTES,
    LANES,
    I32x16,
    add_i32,
    at_least,
    broadcast_f32,
    broadcast_f32_at,
    broadcast_four,
    broadcast_i32,
    dot_u8i8,
    fma_f32,
    i32_to_f32,
    load_f32,
    load_i8,
    load_i32,
    mul_f32,
    nearest_i32,
    registers,
    second_byte,
    store_low_bytes,
    sub_i32,
)

TILE_ROWS = 6
BLOCK = 2 * LANES  # outputs; in a tile, the sums of a row of digits are two vectors

# An activation is an integer up to _LARGEST, stored with _ZERO added: two bytes without a sign.
_LARGEST, _ZERO, _BASE = 32767, 32768, 256
_SMALLEST = 1e-30  # a row with nothing above counts as zeros: float32 could not divide by its unit

# (digits, units, weight, scales, sums, bias, out, fours of inputs, bytes from a row of `out` to the
# next, least result)
Tile = tuple[int, int, int, int, int, int, int, int, int, float]
Kernel = Callable[[Bits, int, int, int, int, int, int, float, int], None]


@dataclass(frozen=True)
class Weight:
    """A layer's parameters as the kernel reads them, filled up with zeros to whole tiles."""

    tiles: Tensor  # int8 [blocks, inputs / 4, BLOCK, 4]
    scales: Tensor  # float32 [blocks * BLOCK]: what 1 stands for in each output's weights
    sums: Tensor  # int32 [blocks * BLOCK]: each output's sum of integers, times _ZERO / _BASE
    bias: Tensor  # float32 [blocks * BLOCK]
    padding: tuple[int, int]  # how many inputs and outputs the layer lacks


def available() -> bool:
    """Whether this CPU has the instruction."""
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512vnni"))


def packed(weight: Tensor, scales: Tensor, bias: Tensor) -> Weight:
    """Reorders int8 [outputs, inputs] for the kernel, with a scale and a bias for each output."""
    padding = (-weight.shape[1] % LANES, -weight.shape[0] % BLOCK)
    weight = pad(weight, (0, padding[0], 0, padding[1]))
    blocks, fours = len(weight) // BLOCK, weight.shape[1] // 4
    tiles = aligned((blocks, fours, BLOCK, 4), torch.int8)
    tiles.copy_(weight.view(blocks, BLOCK, fours, 4).transpose(1, 2))
    return Weight(
        tiles,
        pad(scales.float(), (0, padding[1])),
        weight.sum(1, dtype=torch.int32) * (_ZERO // _BASE),
        pad(bias.float(), (0, padding[1])),
        padding,
    )


def linear(x: Tensor, weight: Weight, *, relu: bool = False) -> Tensor:
    """[rows, inputs] -> [rows, outputs] of the same dtype: float32, bfloat16 or float16."""
    more_inputs, more_outputs = weight.padding
    x = pad(x, (0, more_inputs)) if more_inputs else x.contiguous()
    blocks = len(weight.tiles)
    out = x.new_empty((len(x), blocks * BLOCK))
    kernel(x.dtype)(
        bits(x),
        weight.tiles.data_ptr(),
        weight.scales.data_ptr(),
        weight.sums.data_ptr(),
        weight.bias.data_ptr(),
        out.data_ptr(),
        blocks,
        0.0 if relu else -torch.inf,
        threads(),
    )
    return out[:, :-more_outputs] if more_outputs else out


@functools.cache
def kernel(dtype: torch.dtype) -> Kernel:
    """The compiled product for activations of this dtype. Other tensors are addresses."""
    make_digits, multiply_tile = _digits(dtype), _tiles(dtype)
    size = dtype.itemsize

    def multiply(
        x: Bits,
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
        out_row = size * BLOCK * blocks
        tiles = -(-rows // TILE_ROWS)
        for thread in numba.prange(threads):
            # Each thread makes all digits for itself: that costs less than waiting for the others.
            digits = np.empty((rows, 2, inputs), np.uint8)
            units = np.empty(rows, np.float32)
            for row in range(rows):
                units[row] = make_digits(x[row], digits[row, 0], digits[row, 1])
            for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
                for tile in range(tiles):
                    first, last = rows * tile // tiles, rows * (tile + 1) // tiles
                    multiply_tile(
                        last - first,
                        (
                            digits.ctypes.data + 2 * inputs * first,
                            units.ctypes.data + 4 * first,
                            weight + inputs * BLOCK * block,
                            scales + 4 * BLOCK * block,
                            sums + 4 * BLOCK * block,
                            bias + 4 * BLOCK * block,
                            out + out_row * first + size * BLOCK * block,
                            inputs // 4,
                            out_row,
                            least,
                        ),
                    )

    element = format_of(dtype).type
    return compiled(
        multiply,
        types.void(element[:, ::1], *[types.int64] * 6, types.float32, types.int64),
        variant=str(dtype),
    )


def _digits(
    dtype: torch.dtype,
) -> Callable[[Bits, NDArray[np.uint8], NDArray[np.uint8]], np.float32]:
    """For kernels: writes a row's high and low digits, and returns what 1 stands for in them."""
    memory, size = format_of(dtype), dtype.itemsize
    widen, load = memory.widen, memory.load

    def make_digits(x: Bits, high: NDArray[np.uint8], low: NDArray[np.uint8]) -> np.float32:
        largest = np.float32(0)
        nothing = np.float32(0)
        for i in range(len(x)):
            value = widen(x[i])
            largest = max(largest, abs(value))
            nothing += value * np.float32(0)  # becomes NaN with a value that is not finite
        if largest > _SMALLEST and largest < math.inf:
            factor = broadcast_f32(np.float32(_LARGEST) / largest)
            for i in range(0, len(x), LANES):
                scaled = mul_f32(load(x.ctypes.data + size * i), factor)
                digits = add_i32(nearest_i32(scaled), broadcast_i32(_ZERO))
                store_low_bytes(second_byte(digits), high.ctypes.data + i)
                store_low_bytes(digits, low.ctypes.data + i)
        else:
            high[:] = _ZERO // _BASE
            low[:] = 0
        return largest / np.float32(_LARGEST) + nothing

    return part(make_digits, reordered=True)


def _tiles(dtype: torch.dtype) -> Callable[[int, Tile], None]:
    """For kernels: multiplies a tile of 1 to TILE_ROWS rows."""
    one, two, three, four, five, six = (_tile_of(n, dtype) for n in range(1, TILE_ROWS + 1))

    def multiply_tile(rows: int, tile: Tile) -> None:
        if rows == 1:
            one(*tile)
        elif rows == 2:
            two(*tile)
        elif rows == 3:
            three(*tile)
        elif rows == 4:
            four(*tile)
        elif rows == 5:
            five(*tile)
        else:
            six(*tile)

    return part(multiply_tile)


def _tile_of(
    rows: int, dtype: torch.dtype
) -> Callable[[int, int, int, int, int, int, int, int, int, float], None]:
    """For kernels: multiplies a tile of so many rows."""
    zeros, get, put = registers(4 * rows, I32x16)
    store, size = format_of(dtype).store, dtype.itemsize

    def multiply_tile(
        digits: int,
        units: int,
        weight: int,
        scales: int,
        sums: int,
        bias: int,
        out: int,
        fours: int,
        out_row: int,
        least: float,
    ) -> None:
        totals = zeros()
        for four in range(fours):
            left = load_i8(weight + 2 * BYTES * four)
            right = load_i8(weight + 2 * BYTES * four + BYTES)
            for line in range(2 * rows):  # a row's high digits, and its low ones
                inputs = broadcast_four(digits + 4 * (fours * line + four))
                put(totals, 2 * line, dot_u8i8(get(totals, 2 * line), inputs, left))
                put(totals, 2 * line + 1, dot_u8i8(get(totals, 2 * line + 1), inputs, right))
        floor, base = broadcast_f32(least), broadcast_f32(_BASE)
        for half in range(2):
            zero = load_i32(sums + BYTES * half)
            scale, offset = load_f32(scales + BYTES * half), load_f32(bias + BYTES * half)
            for row in range(rows):
                high = i32_to_f32(sub_i32(get(totals, 4 * row + half), zero))
                low = i32_to_f32(get(totals, 4 * row + 2 + half))
                result = mul_f32(fma_f32(high, base, low), scale)
                result = fma_f32(result, broadcast_f32_at(units + 4 * row), offset)
                store(at_least(result, floor), out + out_row * row + size * LANES * half)

    return part(multiply_tile)
