"""How kernels read and write tensors' memory: numpy and numba lack 16-bit floats."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numpy.typing import NDArray
from torch import Tensor

from blip2_serve.compute.cpu.simd import (
    ADDRESS,
    BYTES,
    LANES,
    BFloat,
    F32x16,
    function,
    load,
    store,
)

Bits = NDArray[Any]  # a tensor's memory: float32 as it is, 16-bit floats as int16


def bits(tensor: Tensor) -> Bits:
    """The same memory for numpy."""
    seen: Bits = (tensor if tensor.dtype == torch.float32 else tensor.view(torch.int16)).numpy()
    return seen


def aligned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor that begins with a cache line."""
    size = dtype.itemsize * math.prod(shape)
    memory = torch.empty(size + BYTES, dtype=torch.uint8)
    return memory[-memory.data_ptr() % BYTES :][:size].view(dtype).view(shape)


class Format(NamedTuple):
    """A dtype for kernels: its type in `Bits`, and functions from it to float32 and back.

    Numbers are rounded as torch rounds: to the nearest, to the even one of two.
    """

    type: types.Type
    widen: Callable[[Any], np.float32]  # an element of `Bits` -> float32
    narrow: Callable[[np.float32], Any]
    load: Callable[[int], ir.Value]  # the 16 numbers at an address -> F32x16
    store: Callable[[ir.Value, int], None]  # (F32x16, address)


@functools.cache
def format_of(dtype: torch.dtype) -> Format:
    """The format of float32, bfloat16 or float16."""
    half = {torch.float32: None, torch.bfloat16: BFloat(), torch.float16: ir.HalfType()}[dtype]
    element = types.int16 if half else types.float32
    in_memory = ir.VectorType(half or ir.FloatType(), LANES)

    @function(types.float32, element)
    def widen(builder: ir.IRBuilder, number: ir.Value) -> ir.Value:
        return builder.fpext(builder.bitcast(number, half), ir.FloatType()) if half else number

    @function(element, types.float32)
    def narrow(builder: ir.IRBuilder, number: ir.Value) -> ir.Value:
        return builder.bitcast(builder.fptrunc(number, half), ir.IntType(16)) if half else number

    @function(F32x16, ADDRESS)
    def load_16(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
        loaded = load(builder, in_memory, address)
        return builder.fpext(loaded, F32x16.llvm) if half else loaded

    @function(types.void, F32x16, ADDRESS)
    def store_16(builder: ir.IRBuilder, vector: ir.Value, address: ir.Value) -> None:
        store(builder, builder.fptrunc(vector, in_memory) if half else vector, address)

    return Format(element, widen, narrow, load_16, store_16)
