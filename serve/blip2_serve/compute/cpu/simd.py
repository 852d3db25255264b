"""Vector types and instructions of AVX512 for use in kernels, which numba does not have.

A kernel is a Python function that numba compiles. In a kernel,

    sums = dot_bf16(sums, broadcast_pair(x), load_bf16(weights))

is three instructions, and `sums` is a register. Each function below is one instruction, or the few
that its docstring names. A vector is named after what it holds: F32x16 is 16 numbers of float32,
one in each lane. An address is an integer, counts bytes and needs no alignment. Python cannot call
these functions: their bodies run when a kernel is compiled, and write LLVM's instructions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar, cast

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.base import BaseContext
from numba.core.datamodel import PrimitiveModel
from numba.core.typing import Signature
from numba.extending import intrinsic, register_model

LANES = 16  # 32-bit numbers in a vector
BYTES = 64  # in a vector, and in a cache line

P = ParamSpec("P")
R = TypeVar("R")


class BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite lacks."""

    intrinsic_name = "bf16"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)

    def __str__(self) -> str:
        return "bfloat"


class LlvmType(types.Type):  # type: ignore[misc]
    """A type of LLVM's, under a name that numba knows."""

    def __init__(self, name: str, llvm: ir.Type) -> None:
        super().__init__(name)
        self.llvm = llvm


@register_model(LlvmType)
class _Model(PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: object, own: LlvmType) -> None:
        super().__init__(manager, own, own.llvm)


F32x16 = LlvmType("F32x16", ir.VectorType(ir.FloatType(), LANES))
I32x16 = LlvmType("I32x16", ir.VectorType(ir.IntType(32), LANES))
BF16x32 = LlvmType("BF16x32", ir.VectorType(BFloat(), 32))
I8x64 = LlvmType("I8x64", ir.VectorType(ir.IntType(8), 64))  # with or without a sign
ADDRESS = types.int64


def function(
    result: types.Type, *arguments: types.Type
) -> Callable[[Callable[Concatenate[ir.IRBuilder, P], R]], Callable[P, R]]:
    """Makes a function for kernels, of these types, out of one that writes its instructions."""

    def decorate(write: Callable[Concatenate[ir.IRBuilder, P], R]) -> Callable[P, R]:
        def generate(
            context: BaseContext, builder: ir.IRBuilder, _: Signature, values: list[ir.Value]
        ) -> ir.Value:
            written = cast("Callable[..., R]", write)(builder, *values)
            return context.get_dummy_value() if written is None else written

        @functools.wraps(write)  # numba takes the names of the arguments from there
        def typed(*_: types.Type) -> tuple[Signature, Callable[..., ir.Value]]:
            return result(*arguments), generate

        made: Callable[P, R] = intrinsic(typed)
        return made

    return decorate


# Constants, loads and stores


@function(F32x16, types.float32)
def broadcast_f32(builder: ir.IRBuilder, number: ir.Value) -> ir.Value:
    """The number in all lanes."""
    return _broadcast(builder, number)


@function(I32x16, types.int32)
def broadcast_i32(builder: ir.IRBuilder, number: ir.Value) -> ir.Value:
    """The number in all lanes."""
    return _broadcast(builder, number)


@function(F32x16, ADDRESS)
def broadcast_f32_at(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """The number at the address in all lanes."""
    return _broadcast(builder, load(builder, ir.FloatType(), address))


@function(BF16x32, ADDRESS)
def broadcast_pair(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """The two numbers of bfloat16 at the address in all lanes."""
    pair = load(builder, ir.IntType(32), address)
    return builder.bitcast(_broadcast(builder, pair), BF16x32.llvm)


@function(I8x64, ADDRESS)
def broadcast_four(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """The four bytes at the address in all lanes."""
    four = load(builder, ir.IntType(32), address)
    return builder.bitcast(_broadcast(builder, four), I8x64.llvm)


@function(F32x16, ADDRESS)
def load_f32(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return load(builder, F32x16.llvm, address)


@function(I32x16, ADDRESS)
def load_i32(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return load(builder, I32x16.llvm, address)


@function(BF16x32, ADDRESS)
def load_bf16(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return load(builder, BF16x32.llvm, address)


@function(I8x64, ADDRESS)
def load_i8(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return load(builder, I8x64.llvm, address)


@function(types.void, I32x16, ADDRESS)
def store_low_bytes(builder: ir.IRBuilder, vector: ir.Value, address: ir.Value) -> None:
    """The lowest byte of each lane, 16 bytes in all (vpmovdb)."""
    store(builder, builder.trunc(vector, ir.VectorType(ir.IntType(8), LANES)), address)


# Arithmetic in each lane


@function(F32x16, F32x16, F32x16)
def add_f32(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.fadd(a, b)


@function(F32x16, F32x16, F32x16)
def mul_f32(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.fmul(a, b)


@function(F32x16, F32x16, F32x16, F32x16)
def fma_f32(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c, rounded once."""
    return _call(builder, "llvm.fma.v16f32", F32x16, a, b, c)


@function(F32x16, F32x16, F32x16)
def at_least(builder: ir.IRBuilder, vector: ir.Value, floor: ir.Value) -> ir.Value:
    """The larger of the two (vmaxps); NaN in `vector` stays NaN."""
    return builder.select(builder.fcmp_ordered("<", vector, floor), floor, vector)


@function(I32x16, F32x16)
def nearest_i32(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """The nearest integer, the even one of two; the number must fit into 32 bits."""
    return builder.fptosi(_call(builder, "llvm.rint.v16f32", F32x16, vector), I32x16.llvm)


@function(F32x16, I32x16)
def i32_to_f32(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    return builder.sitofp(vector, F32x16.llvm)


@function(I32x16, I32x16, I32x16)
def add_i32(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.add(a, b)


@function(I32x16, I32x16, I32x16)
def sub_i32(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.sub(a, b)


@function(I32x16, I32x16)
def second_byte(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """Shifts right by 8 bits, without a sign."""
    return builder.lshr(vector, I32x16.llvm([8] * LANES))


# Products


@function(F32x16, F32x16, BF16x32, BF16x32)
def dot_bf16(builder: ir.IRBuilder, sums: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """Adds to each lane the products of its two pairs of bfloat16 (vdpbf16ps)."""
    return _call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", F32x16, sums, a, b)


@function(I32x16, I32x16, I8x64, I8x64)
def dot_u8i8(builder: ir.IRBuilder, sums: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """Adds to each lane the products of its four pairs of bytes (vpdpbusd).

    Those of `a` have no sign, those of `b` have one.
    """
    return _call(builder, "llvm.x86.avx512.vpdpbusd.512", I32x16, sums, a, b)


# Arrays of vectors


class Registers(NamedTuple):
    """Functions for kernels: an array of vectors that LLVM keeps in registers.

    It does where it knows every index, as in loops over constant ranges, which it unrolls.
    """

    zeros: Callable[[], ir.Value]  # -> a new array
    get: Callable[[ir.Value, int], ir.Value]  # (array, index) -> vector
    put: Callable[[ir.Value, int, ir.Value], None]  # (array, index, vector)


def registers(count: int, vector: LlvmType) -> Registers:
    """Arrays of so many vectors."""
    llvm = ir.ArrayType(vector.llvm, count)
    array = LlvmType(f"{count} x {vector.name}", llvm.as_pointer())

    def element(builder: ir.IRBuilder, array: ir.Value, index: ir.Value) -> ir.Value:
        return builder.gep(array, [ir.IntType(64)(0), index], inbounds=True)

    @function(array)
    def zeros(builder: ir.IRBuilder) -> ir.Value:
        new = cgutils.alloca_once(builder, llvm)
        for index in range(count):
            builder.store(vector.llvm(None), element(builder, new, ir.IntType(64)(index)))
        return new

    @function(vector, array, types.int64)
    def get(builder: ir.IRBuilder, array: ir.Value, index: ir.Value) -> ir.Value:
        return builder.load(element(builder, array, index))

    @function(types.void, array, types.int64, vector)
    def put(builder: ir.IRBuilder, array: ir.Value, index: ir.Value, value: ir.Value) -> None:
        builder.store(value, element(builder, array, index))

    return Registers(zeros, get, put)


# For functions that write instructions


def load(builder: ir.IRBuilder, llvm: ir.Type, address: ir.Value) -> ir.Value:
    loaded = builder.load(builder.inttoptr(address, llvm.as_pointer()))
    loaded.align = 1
    return loaded


def store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 1


def _broadcast(builder: ir.IRBuilder, number: ir.Value) -> ir.Value:
    vector = ir.VectorType(number.type, LANES)
    first = builder.insert_element(vector(ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(first, first, I32x16.llvm(None))


def _call(builder: ir.IRBuilder, name: str, result: LlvmType, *arguments: ir.Value) -> ir.Value:
    """An instruction that LLVM has as a function."""
    kind = ir.FunctionType(result.llvm, [argument.type for argument in arguments])
    called = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(called, arguments)
