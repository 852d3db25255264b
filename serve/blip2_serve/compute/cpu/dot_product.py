"""Linear layers in bfloat16 by AVX512's dot products (vdpbf16ps), for any number of rows.

A decode step has few rows and reads every weight once for all of them, so memory sets its time.
This kernel reads as fast as the memory delivers, where oneDNN reaches two thirds of that; with many
rows it computes as fast as oneDNN (docs/lab/2026-11-cpu-linear-kernels.md).

A tile is up to TILE_ROWS rows of activations by BLOCK outputs: as many sums as fit into registers.
Weights lie in the order in which tiles read them: for each block of outputs, two inputs of each
output side by side, [blocks, inputs / 2, BLOCK, 2].
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import llvmlite.binding
import numba
import torch
from numba import types
from torch import Tensor

from blip2_serve.compute.cpu.compiler import compiled, part, threads
from blip2_serve.compute.cpu.formats import aligned, format_of
from blip2_serve.compute.cpu.simd import (
    BYTES,
    LANES,
    F32x16,
    add_f32,
    at_least,
    broadcast_f32,
    broadcast_pair,
    dot_bf16,
    load_bf16,
    load_f32,
    registers,
)

TILE_ROWS = 8
BLOCK = 2 * LANES  # outputs; in a tile, a row's sums are two vectors

# (rows, x, weight, bias, out, pairs of inputs, bytes from a row of `out` to the next, least result)
Tile = tuple[int, int, int, int, int, int, float]


def available() -> bool:
    """Whether this CPU has the instruction, and no better one: AMX multiplies whole tiles."""
    features = llvmlite.binding.get_host_cpu_features()
    return bool(features.get("avx512bf16")) and not features.get("amx-bf16")


def fits(weight: Tensor) -> bool:
    """Whether the kernel takes weights of this shape."""
    outputs, inputs = weight.shape
    return outputs % BLOCK == 0 and inputs % 2 == 0


def packed(weight: Tensor) -> Tensor:
    """Reorders a weight that fits, bfloat16 [outputs, inputs], for the kernel."""
    outputs, inputs = weight.shape
    tiles = aligned((outputs // BLOCK, inputs // 2, BLOCK, 2), torch.bfloat16)
    return tiles.copy_(weight.view(outputs // BLOCK, BLOCK, inputs // 2, 2).transpose(1, 2))


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, relu: bool = False) -> Tensor:
    """bfloat16 [rows, inputs] -> [rows, outputs], by a packed weight and a float32 bias [outputs].

    Sums are float32, rounded once.
    """
    x = x.contiguous()
    blocks, pairs = weight.shape[:2]
    out = x.new_empty((len(x), blocks * BLOCK))
    kernel()(
        x.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        out.data_ptr(),
        len(x),
        pairs,
        blocks,
        0.0 if relu else -torch.inf,
        threads(),
    )
    return out


@functools.cache
def kernel() -> Callable[[int, int, int, int, int, int, int, float, int], None]:
    """The compiled product. Tensors are addresses, since numpy has no bfloat16."""
    multiply_tile = _tiles()

    def multiply(
        x: int,
        weight: int,
        bias: int,
        out: int,
        rows: int,
        pairs: int,
        blocks: int,
        least: float,
        threads: int,
    ) -> None:
        x_row, weight_block = 4 * pairs, 4 * pairs * BLOCK  # bytes
        bias_block, out_block, out_row = 4 * BLOCK, 2 * BLOCK, 2 * BLOCK * blocks
        tiles = -(-rows // TILE_ROWS)
        for thread in numba.prange(threads):
            for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
                for tile in range(tiles):
                    first, last = rows * tile // tiles, rows * (tile + 1) // tiles
                    multiply_tile(
                        last - first,
                        (
                            x + first * x_row,
                            weight + block * weight_block,
                            bias + block * bias_block,
                            out + first * out_row + block * out_block,
                            pairs,
                            out_row,
                            least,
                        ),
                    )

    return compiled(multiply, types.void(*[types.int64] * 7, types.float32, types.int64))


def _tiles() -> Callable[[int, Tile], None]:
    """For kernels: multiplies a tile of 1 to TILE_ROWS rows."""
    one, two, three, four, five, six, seven, eight = map(_tile_of, range(1, TILE_ROWS + 1))

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
        elif rows == 6:
            six(*tile)
        elif rows == 7:
            seven(*tile)
        else:
            eight(*tile)

    return part(multiply_tile)


def _tile_of(rows: int) -> Callable[[int, int, int, int, int, int, float], None]:
    """For kernels: multiplies a tile of so many rows."""
    zeros, get, put = registers(2 * rows, F32x16)
    store = format_of(torch.bfloat16).store

    def multiply_tile(
        x: int, weight: int, bias: int, out: int, pairs: int, out_row: int, least: float
    ) -> None:
        sums = zeros()
        for pair in range(pairs):
            left = load_bf16(weight + 2 * BYTES * pair)
            right = load_bf16(weight + 2 * BYTES * pair + BYTES)
            for row in range(rows):
                inputs = broadcast_pair(x + 4 * (pairs * row + pair))
                put(sums, 2 * row, dot_bf16(get(sums, 2 * row), inputs, left))
                put(sums, 2 * row + 1, dot_bf16(get(sums, 2 * row + 1), inputs, right))
        floor = broadcast_f32(least)
        for half in range(2):
            offsets = load_f32(bias + BYTES * half)
            for row in range(rows):
                result = at_least(add_f32(get(sums, 2 * row + half), offsets), floor)
                store(result, out + out_row * row + 2 * LANES * half)

    return part(multiply_tile)
