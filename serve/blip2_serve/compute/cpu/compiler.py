"""How kernels are compiled, whose threads they use, and the 16-bit floats that numba lacks."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

# The threads that torch computes with, where it can be: a second set would compete with them.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "workqueue", "tbb"]

Bits = NDArray[Any]  # what numpy can hold of a tensor: 16-bit floats as integers
BITS = {
    torch.float32: (torch.float32, types.float32),
    torch.bfloat16: (torch.int16, types.int16),
    torch.float16: (torch.int16, types.int16),
}

# Sums in any order, or they could not use vector instructions.
REORDERED = frozenset({"reassoc", "contract", "nsz"})


def compiled(
    function: Callable[..., None], signature: Any, *, reordered: bool = False
) -> Callable[..., None]:
    """Machine code for these types and this machine, which runs without Python's lock.

    `numba.prange` in it runs in parallel. Compiling takes a second or two.
    """
    compile_now = numba.njit(
        signature, parallel=True, nogil=True, fastmath=set(REORDERED) if reordered else False
    )
    machine_code: Callable[..., None] = compile_now(function)
    _start_threads()
    return machine_code


def threads() -> int:
    """How many threads kernels use when called from this thread: as many as torch does."""
    count = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(count)
    return int(count)


def _start_threads() -> None:
    """Starts numba's threads, which are OpenMP's, and takes back what numba sets along with it.

    It allows parallel regions inside others. Then each product inside torch's fused attention,
    which is such a region, starts threads of its own and takes twice as long.
    """
    threads()
    allow = getattr(ctypes.CDLL(None), "omp_set_max_active_levels", None)
    if allow:  # numba may have had to do without OpenMP
        allow(1)


class BFloat16Type(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not list."""

    intrinsic_name = "bf16"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat16Type)

    def __hash__(self) -> int:
        return hash(BFloat16Type)

    def __str__(self) -> str:
        return "bfloat"


def bits(tensor: Tensor) -> Bits:
    """The same memory for numpy."""
    seen: Bits = tensor.view(BITS[tensor.dtype][0]).numpy()
    return seen


def converters(dtype: torch.dtype) -> tuple[Any, Any]:
    """For use in a kernel: what is in memory -> float32, and back, rounded as torch rounds."""
    if dtype == torch.float32:
        return _as_it_is, _as_it_is
    half: ir.Type = {torch.bfloat16: BFloat16Type(), torch.float16: ir.HalfType()}[dtype]

    @intrinsic  # type: ignore[untyped-decorator]
    def widen(_context: Any, _bits: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            return builder.fpext(builder.bitcast(args[0], half), ir.FloatType())

        return types.float32(types.int16), generate

    @intrinsic  # type: ignore[untyped-decorator]
    def narrow(_context: Any, _number: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            return builder.bitcast(builder.fptrunc(args[0], half), ir.IntType(16))

        return types.int16(types.float32), generate

    return widen, narrow


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _as_it_is(number: Any) -> Any:
    return number
