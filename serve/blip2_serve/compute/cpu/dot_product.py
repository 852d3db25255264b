"""Linear layers in bfloat16 by AVX512's dot products (vdpbf16ps), for any number of rows.

A decode step has few rows, and reads every weight once for all of them: memory is what it takes
time for. This kernel reads as fast as memory gives, where oneDNN's reaches two thirds of that, and
with many rows it computes as fast as oneDNN does (DESIGN.md). It needs no plan for each number of
rows.

A tile is up to TILE_ROWS rows of activations by BLOCK outputs: that many sums fit into registers.
Weights lie as tiles want them, for each block of outputs two inputs of each one after the other:
[blocks, inputs / 2, BLOCK, 2].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from blip2_serve.compute.cpu.compiler import BFloat16Type, compiled, threads
from blip2_serve.compute.cpu.vectors import (
    BYTES,
    FLOATS,
    LANES,
    WORD,
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

TILE_ROWS = 8
BLOCK = 2 * LANES

_PAIRS = ir.VectorType(BFloat16Type(), 2 * LANES)
_RESULTS = ir.VectorType(BFloat16Type(), LANES)


def available() -> bool:
    """Whether this CPU has the instruction, and has no better one: AMX multiplies whole tiles."""
    features = llvmlite.binding.get_host_cpu_features()
    return bool(features.get("avx512bf16")) and not features.get("amx-bf16")


def fits(weight: Tensor) -> bool:
    """Whether the kernel takes weights of this shape."""
    outputs, inputs = weight.shape
    return outputs % BLOCK == 0 and inputs % 2 == 0


def packed(weight: Tensor) -> Tensor:
    """bfloat16 [outputs, inputs], of a shape that fits -> the same as the kernel reads it."""
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
def kernel() -> Callable[..., None]:
    """The compiled product; arguments are addresses, since numpy has no bfloat16."""

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
        x_row, out_row, weight_block = pairs * 4, blocks * BLOCK * 2, pairs * BLOCK * 4
        tiles = -(-rows // TILE_ROWS)
        for thread in numba.prange(threads):
            for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
                for tile in range(tiles):
                    first, last = rows * tile // tiles, rows * (tile + 1) // tiles
                    _tile(
                        last - first,
                        x + first * x_row,
                        weight + block * weight_block,
                        bias + block * BLOCK * 4,
                        out + first * out_row + block * BLOCK * 2,
                        pairs,
                        out_row,
                        least,
                    )

    signature = types.void(*[types.int64] * 7, types.float32, types.int64)
    return compiled(multiply, signature)


@intrinsic  # type: ignore[untyped-decorator]
def _tile(
    _context: Any,
    rows: Any,
    x: Any,
    weight: Any,
    bias: Any,
    out: Any,
    pairs: Any,
    stride: Any,
    least: Any,
) -> Any:
    """For use in a kernel: 1 to TILE_ROWS rows by one block.

    Arguments: the number of rows; addresses of the first row of activations, the block's weights,
    biases and first results; the number of pairs of inputs, the bytes from one row of results to
    the next, and the least result.
    """

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        one_of(builder, args[0], TILE_ROWS, lambda count: _rows(builder, count, *args[1:]))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7, types.float32), generate


def _rows(
    builder: Any,
    rows: int,
    x: Any,
    weight: Any,
    bias: Any,
    out: Any,
    pairs: Any,
    stride: Any,
    least: Any,
) -> None:
    dot = instruction(builder, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, [FLOATS, _PAIRS, _PAIRS])
    vectors = range(BLOCK // LANES)
    x_rows = [at(builder, x, builder.mul(pairs, number(4 * row))) for row in range(rows)]

    def add_pair(pair: Any, sums: list[Any]) -> list[Any]:
        line = at(builder, weight, builder.mul(pair, number(4 * BLOCK)))
        weights = [
            load(builder, _PAIRS, at(builder, line, number(BYTES * v)), BYTES) for v in vectors
        ]
        offset = builder.mul(pair, number(4))
        new: list[Any] = []
        for row in range(rows):
            two = everywhere(builder, load(builder, WORD, at(builder, x_rows[row], offset), 4))
            two = builder.bitcast(two, _PAIRS)
            new += [builder.call(dot, [sums[len(new) + v], two, weights[v]]) for v in vectors]
        return new

    sums = loop(builder, pairs, [zeros(FLOATS)] * rows * len(vectors), add_pair)
    floor = everywhere(builder, least)
    for v in vectors:
        offset = load(builder, FLOATS, at(builder, bias, number(BYTES * v)), 4)
        for row in range(rows):
            result = builder.fadd(sums[row * len(vectors) + v], offset)
            result = builder.fptrunc(at_least(builder, result, floor), _RESULTS)
            place = at(builder, out, builder.mul(stride, number(row)), number(2 * LANES * v))
            store(builder, result, place, 2)
