"""Compiled kernels are kept on the disk, and only used where they are the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numba import types
from numba.core.caching import IndexDataCacheFile
from numpy.typing import NDArray

from blip2_serve.compute.cpu import compiler

# Prints for each kernel of an attention whether it came from the disk, and a product.
SCRIPT = """
import json, sys, torch
from blip2_serve.compute.cpu import paged_attention as attention

def is_kept(dtype, head_dim):
    return bool(attention.kernel(dtype, head_dim).stats.cache_hits)

kinds = [(torch.float32, int(head_dim)) for head_dim in sys.argv[1:]]
found = [is_kept(*kind) for kind in kinds]
answers = []
for dtype, head_dim in kinds:
    torch.manual_seed(0)
    kv = torch.randn(2, 9, 2, head_dim)
    attend = attention.attend_decode([(1, 2, 3)], kv[None])
    answers.append(float(attend(0, torch.randn(1, 3, 2, head_dim)).sum()))
print(json.dumps([found, answers]))
"""


def printed(script: str, folder: Path, *arguments: object) -> Any:
    """What a new process prints as JSON, with its kernels kept in this folder."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        # Flags are in numba's names, too: a set, whose order depends on the seed.
        env={**os.environ, "NUMBA_CACHE_DIR": str(folder), "PYTHONHASHSEED": "0"},
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_another_process_finds_each_kernel(tmp_path: Path) -> None:
    first, expected = printed(SCRIPT, tmp_path, 8, 16)
    second, answers = printed(SCRIPT, tmp_path, 8, 16)

    assert first == [False, False]
    assert second == [True, True]
    assert answers == expected


NAMES = """
import json, re, torch
from blip2_serve.compute.cpu import paged_attention as attention

(code,) = attention.kernel(torch.float32, 8).inspect_llvm().values()
print(json.dumps(re.findall('define .*@"?(.*paged_attention[^"(]*)', code)))
"""


@pytest.mark.slow
def test_no_two_processes_give_their_machine_code_the_same_names(tmp_path: Path) -> None:
    """Of two kernels from the disk with a name in common, the linker calls one for both."""
    first, second = (set(printed(NAMES, tmp_path / name)) for name in ("a", "b"))

    assert first
    assert second
    assert not first & second


SIGNATURE = types.void(types.float32[::1])


def double(x: NDArray[np.float32]) -> None:
    for i in numba.prange(len(x)):
        x[i] *= 2


def triple(x: NDArray[np.float32]) -> None:
    for i in numba.prange(len(x)):
        x[i] *= 3


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def times(factor: float) -> Any:
    """Functions with one name and different code, as for each type of numbers."""

    def multiply(x: NDArray[np.float32]) -> None:
        for i in numba.prange(len(x)):
            x[i] *= factor

    return multiply


def compiled(function: Any = double, factor: float = 2.0, **more: Any) -> Any:
    kernel: Any = compiler.compiled(function, SIGNATURE, **more)
    numbers = np.ones(3, np.float32)
    kernel(numbers)
    assert numbers.tolist() == [factor] * 3
    return kernel


def is_kept(kernel: Any) -> bool:
    return bool(kernel.stats.cache_hits)


def test_variants_and_functions_are_kept_apart() -> None:
    assert not is_kept(compiled())
    assert is_kept(compiled())
    assert not is_kept(compiled(variant=1))
    assert not is_kept(compiled(variant=2))
    assert not is_kept(compiled(triple, 3.0))
    assert is_kept(compiled(variant=1))


def test_two_processes_that_compile_at_once_leave_each_kernel_under_its_own_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other one keeps its kernel while this one does, and knows nothing of this one's."""
    other = partial(compiled, times(3), 3.0, variant=3)
    save = IndexDataCacheFile._save_data

    def interrupted(file: IndexDataCacheFile, name: str, data: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(IndexDataCacheFile, "_save_data", save)
            patch.setattr(IndexDataCacheFile, "_load_index", lambda _: {})
            other()
        save(file, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(IndexDataCacheFile, "_save_data", interrupted)
        compiled(times(2))

    assert is_kept(other())
    assert is_kept(compiled(times(2)))


def test_after_a_change_of_any_code_they_are_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled()
    monkeypatch.setattr(compiler, "_code", lambda: "another")

    assert not is_kept(compiled())


def test_any_file_of_the_kernels_counts_as_their_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(Path(compiler.__file__).parent, tmp_path / "cpu"))
    monkeypatch.setattr(compiler, "__file__", str(copy / "compiler.py"))
    hash_now = compiler._code.__wrapped__
    before = hash_now()
    assert before == hash_now() == compiler._code()
    with (copy / "simd.py").open("a") as file:
        file.write("# more")

    assert hash_now() != before


@pytest.mark.parametrize("damage", [b"", b"nonsense"])
@pytest.mark.parametrize("kind", ["nbc", "nbi"])
def test_a_damaged_file_costs_only_time(
    folder: Path, kind: str, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    compiled()
    (file,) = folder.rglob(f"*.{kind}")
    file.write_bytes(damage)

    assert not is_kept(compiled())
    assert "cannot use" in caplog.text
    assert is_kept(compiled())


def test_a_full_disk_costs_only_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(compiler.FunctionCache, "save_overload", full)
    compiled()
    assert "cannot keep" in caplog.text


def test_where_nothing_can_be_written_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*_: object) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(compiler, "_Kept", nowhere)
    assert not is_kept(compiled())
    assert not is_kept(compiled())
