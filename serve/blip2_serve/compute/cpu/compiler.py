"""How kernels are compiled, and whose threads they use."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import logging
import secrets
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numba
import torch
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.registry import cpu_target
from numba.core.typing import Signature

logger = logging.getLogger(__name__)

# The threads that torch computes with, where it can be: a second set would compete with them.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "workqueue", "tbb"]

# numba counts the functions of a process, and names their machine code by that number, their types
# and flags. Of two that two processes had named alike, such as those for two head sizes, the linker
# would call one for both: so no two processes begin to count at the same number.
FunctionIdentity._unique_ids = itertools.count(secrets.randbits(60))

# Lets LLVM add in any order, or it could not use vector instructions.
_REORDERED = frozenset({"reassoc", "contract", "nsz"})

P = ParamSpec("P")
R = TypeVar("R")


def compiled(
    function: Callable[P, None],
    signature: Signature,
    *,
    variant: Hashable = None,
    reordered: bool = False,
) -> Callable[P, None]:
    """Compiles a kernel for these types and this machine. It runs without Python's lock.

    `numba.prange` in it runs in parallel. Compiling takes a second or two, but for those that are
    found on the disk; `variant` sets apart kernels that are made by the same code.
    """
    kernel = numba.njit(parallel=True, nogil=True, fastmath=_fastmath(reordered))(function)
    with contextlib.suppress(RuntimeError):  # no place to keep it can be written
        kernel._cache = _Kept(function, signature, variant)
    kernel.compile(signature)
    kernel.disable_compile()
    _start_threads()
    machine_code: Callable[P, None] = kernel
    return machine_code


class _Kept(FunctionCache):  # type: ignore[misc]
    """A compiled kernel on the disk, where Python keeps compiled modules too.

    numba names it by its closure, in which there are other kernels, and those have another name in
    each process. Here, it is named by all code of this folder. What fails costs only time.

    Each has a file of its own. In numba's, which are shared by all that one function makes, two
    processes that compile at the same time can leave one's kernel under the other's name.
    """

    def __init__(
        self, function: Callable[..., None], signature: Signature, variant: Hashable
    ) -> None:
        super().__init__(function)
        machine = cpu_target.target_context.codegen().magic_tuple()
        self._key = repr((signature, machine, _code(), variant))
        name = f"{self._impl.filename_base}-{hashlib.sha256(self._key.encode()).hexdigest()}"
        stamp = self._impl.locator.get_source_stamp()
        self._cache_file = IndexDataCacheFile(self._cache_path, name, stamp)

    def _index_key(self, *_: object) -> Hashable:
        return self._key

    def load_overload(self, signature: Signature, context: Any) -> Any:
        try:
            return super().load_overload(signature, context)
        except Exception as error:
            logger.warning("cannot use a compiled kernel from disk: %r", error)
            with contextlib.suppress(Exception):
                self.flush()
            return None

    def save_overload(self, signature: Signature, data: Any) -> None:
        try:
            super().save_overload(signature, data)
        except Exception as error:
            logger.warning("cannot keep a compiled kernel on disk: %r", error)


@functools.cache
def _code() -> str:
    """A hash of what any kernel may be made of."""
    found = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()


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
