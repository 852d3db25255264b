"""How kernels are compiled, and whose threads they use."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numba
import torch
from numba.core.typing import Signature

# The threads that torch computes with, where it can be: a second set would compete with them.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "workqueue", "tbb"]

# Lets LLVM add in any order, or it could not use vector instructions.
_REORDERED = frozenset({"reassoc", "contract", "nsz"})

P = ParamSpec("P")
R = TypeVar("R")


def compiled(
    function: Callable[P, None], signature: Signature, *, reordered: bool = False
) -> Callable[P, None]:
    """Compiles a kernel for these types and this machine. It runs without Python's lock.

    `numba.prange` in it runs in parallel. Compiling takes a second or two.
    """
    compile_now = numba.njit(signature, parallel=True, nogil=True, fastmath=_fastmath(reordered))
    machine_code: Callable[P, None] = compile_now(function)
    _start_threads()
    return machine_code


def part(function: Callable[P, R], *, reordered: bool = False) -> Callable[P, R]:
    """Makes a function that kernels can call, and Python cannot."""
    make = numba.njit(fastmath=_fastmath(reordered), no_cpython_wrapper=True, no_cfunc_wrapper=True)
    made: Callable[P, R] = make(function)
    return made


def threads() -> int:
    """How many threads a kernel uses when called from this thread: as many as torch does."""
    count = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(count)
    return int(count)


def _fastmath(reordered: bool) -> set[str] | bool:
    return set(_REORDERED) if reordered else False


def _start_threads() -> None:
    """Starts numba's threads, which are OpenMP's, and takes back what numba sets along with it.

    It allows parallel regions inside others. Then each product inside torch's fused attention,
    which is such a region, starts threads of its own and takes twice as long.
    """
    threads()
    allow = getattr(ctypes.CDLL(None), "omp_set_max_active_levels", None)
    if allow:  # numba may have had to do without OpenMP
        allow(1)
