"""What kernels write in LLVM's language: vectors of 512 bits, and tiles of them.

numba has no vectors, and its loops cannot name an instruction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

LANES = 16  # 32-bit numbers in a register
BYTES = 64  # of a register, and of a cache line

INT, WORD, FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()
WORDS, FLOATS = ir.VectorType(WORD, LANES), ir.VectorType(FLOAT, LANES)


def number(value: int) -> Any:
    return ir.Constant(INT, value)


def zeros(kind: Any) -> Any:
    return ir.Constant(kind, None)


def at(builder: Any, address: Any, *offsets: Any) -> Any:
    """An address so many bytes on."""
    return functools.reduce(builder.add, offsets, address)


def load(builder: Any, kind: Any, address: Any, align: int) -> Any:
    loaded = builder.load(builder.inttoptr(address, kind.as_pointer()))
    loaded.align = align
    return loaded


def store(builder: Any, value: Any, address: Any, align: int) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = align


def everywhere(builder: Any, value: Any) -> Any:
    """One 32-bit number in all lanes."""
    kind = ir.VectorType(value.type, LANES)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, WORD(0))
    return builder.shuffle_vector(first, first, zeros(WORDS))


def at_least(builder: Any, value: Any, floor: Any) -> Any:
    """The larger of two in each lane; what is not a number stays so."""
    return builder.select(builder.fcmp_ordered("<", value, floor), floor, value)


def instruction(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """One that LLVM has a name for, as a function."""
    kind = ir.FunctionType(result, arguments)
    return builder.module.globals.get(name) or ir.Function(builder.module, kind, name)


def loop(builder: Any, count: Any, sums: list[Any], body: Callable[..., list[Any]]) -> list[Any]:
    """Adds up in registers: `body(i, sums)` returns the next sums, `count` times, at least once."""
    before = builder.block
    again, end = builder.append_basic_block("again"), builder.append_basic_block("end")
    builder.branch(again)
    builder.position_at_end(again)
    i = builder.phi(INT)
    carried = [builder.phi(value.type) for value in sums]
    new = body(i, carried)
    following = builder.add(i, number(1))
    i.add_incoming(number(0), before)
    i.add_incoming(following, again)
    for phi, first, later in zip(carried, sums, new, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, again)
    builder.cbranch(builder.icmp_signed("<", following, count), again, end)
    builder.position_at_end(end)
    return new


def one_of(builder: Any, rows: Any, most: int, generate: Callable[[int], None]) -> None:
    """Code for each number of rows from 1 to `most`; the one that `rows` says is run."""
    done = builder.append_basic_block("done")
    switch = builder.switch(rows, done)
    for count in range(1, most + 1):
        case = builder.append_basic_block(f"rows.{count}")
        switch.add_case(INT(count), case)
        builder.position_at_end(case)
        generate(count)
        builder.branch(done)
    builder.position_at_end(done)


def aligned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor that begins with a cache line."""
    size = dtype.itemsize * functools.reduce(int.__mul__, shape)
    memory = torch.empty(size + BYTES, dtype=torch.uint8)
    return memory[-memory.data_ptr() % BYTES :][:size].view(dtype).view(shape)
