"""Linear layers in bfloat16 by AVX512's dot products (vdpbf16ps), for any number of rows.

A decode step has few rows, and reads every weight once for all of them: memory is what it takes
time for. This kernel reads as fast as memory gives, where oneDNN's reaches two thirds of that, and
with many rows it computes as fast as oneDNN does (DESIGN.md). It needs no plan for each number of
rows.

A tile is up to TILE_ROWS rows of activations by BLOCK outputs: that many sums fit into registers.
Weights lie as tiles want them, for each block of outputs two inputs of each one after the other:
[blocks, inputs / 2, BLOCK, 2]. numba has no vectors: a tile's loop is written in LLVM's language.
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

from blip2_serve.kernels.compiler import BFloat16Type, compiled, threads

TILE_ROWS = 8
LANES = 16  # sums in a register
BLOCK = 2 * LANES
CACHE_LINE = 64  # bytes; as many as a register has

_DOT = "llvm.x86.avx512bf16.dpbf16ps.512"
_INT, _WORD = ir.IntType(64), ir.IntType(32)
_WORDS = ir.VectorType(_WORD, LANES)
_SUMS = ir.VectorType(ir.FloatType(), LANES)
_PAIRS = ir.VectorType(BFloat16Type(), 2 * LANES)
_RESULTS = ir.VectorType(BFloat16Type(), LANES)


def available() -> bool:
    """Whether this CPU has the instruction, and has no better one: AMX multiplies whole tiles."""
    features = llvmlite.binding.get_host_cpu_features()
    return bool(features.get("avx512bf16")) and not features.get("amx-bf16")


def packed(weight: Tensor) -> Tensor:
    """bfloat16 [outputs, inputs] -> the same as the kernel reads it.

    Outputs must be a multiple of BLOCK, inputs of 2.
    """
    outputs, inputs = weight.shape
    shape = (outputs // BLOCK, inputs // 2, BLOCK, 2)
    memory = torch.empty(weight.nbytes + CACHE_LINE, dtype=torch.uint8)
    aligned = memory[-memory.data_ptr() % CACHE_LINE :][: weight.nbytes]
    tiles = aligned.view(torch.bfloat16).view(shape)
    return tiles.copy_(weight.view(shape[0], BLOCK, shape[1], 2).transpose(1, 2))


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
        done = builder.append_basic_block("tile.done")
        switch = builder.switch(args[0], done)
        for rows in range(1, TILE_ROWS + 1):
            case = builder.append_basic_block(f"tile.{rows}")
            switch.add_case(_INT(rows), case)
            builder.position_at_end(case)
            _generate_tile(builder, rows, *args[1:])
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7, types.float32), generate


def _generate_tile(
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
    def number(value: int) -> Any:
        return ir.Constant(_INT, value)

    def at(address: Any, *offsets: Any) -> Any:
        return functools.reduce(builder.add, offsets, address)

    def load(kind: Any, address: Any, align: int) -> Any:
        loaded = builder.load(builder.inttoptr(address, kind.as_pointer()))
        loaded.align = align
        return loaded

    def everywhere(value: Any, kind: Any) -> Any:
        first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _WORD(0))
        return builder.shuffle_vector(first, first, ir.Constant(_WORDS, None))

    vectors = range(BLOCK // LANES)
    dot_type = ir.FunctionType(_SUMS, [_SUMS, _PAIRS, _PAIRS])
    dot = builder.module.globals.get(_DOT) or ir.Function(builder.module, dot_type, _DOT)
    x_rows = [at(x, builder.mul(pairs, number(4 * row))) for row in range(rows)]

    before = builder.block
    loop, end = builder.append_basic_block("pair"), builder.append_basic_block("end")
    builder.branch(loop)
    builder.position_at_end(loop)
    pair = builder.phi(_INT)
    sums = [[builder.phi(_SUMS) for _ in vectors] for _ in range(rows)]
    line = at(weight, builder.mul(pair, number(4 * BLOCK)))
    weights = [load(_PAIRS, at(line, number(CACHE_LINE * v)), CACHE_LINE) for v in vectors]
    x_offset = builder.mul(pair, number(4))
    new_sums = []
    for row in range(rows):
        two = everywhere(load(_WORD, at(x_rows[row], x_offset), 4), _WORDS)
        two = builder.bitcast(two, _PAIRS)
        new_sums.append([builder.call(dot, [sums[row][v], two, weights[v]]) for v in vectors])
    next_pair = builder.add(pair, number(1))
    pair.add_incoming(number(0), before)
    pair.add_incoming(next_pair, loop)
    for row in range(rows):
        for v in vectors:
            sums[row][v].add_incoming(ir.Constant(_SUMS, None), before)
            sums[row][v].add_incoming(new_sums[row][v], loop)
    builder.cbranch(builder.icmp_signed("<", next_pair, pairs), loop, end)

    builder.position_at_end(end)
    floor = everywhere(least, _SUMS)
    for v in vectors:
        offset = load(_SUMS, at(bias, number(CACHE_LINE * v)), 4)
        for row in range(rows):
            result = builder.fadd(new_sums[row][v], offset)
            # Not the other way round: what is not a number stays so.
            too_low = builder.fcmp_ordered("<", result, floor)
            result = builder.fptrunc(builder.select(too_low, floor, result), _RESULTS)
            place = at(out, builder.mul(stride, number(row)), number(2 * LANES * v))
            builder.store(result, builder.inttoptr(place, _RESULTS.as_pointer())).align = 2
