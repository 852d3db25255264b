"""What a replica makes of its environment, on whatever node it is."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from blip2_serve import environment

# KMP_VERSION has Intel's OpenMP print its name as soon as it is used.
COMPUTES = """
import blip2_serve.stages.device, torch  # the package comes first, whatever is imported
torch.set_num_threads(2)
torch.randn(1000, 1000) @ torch.randn(1000, 1000)
"""

needs_intel_openmp = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="Intel's OpenMP exists for Linux on x86 only",
)


def stderr_of(code: str, **more: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment.REPLICA | more,
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stderr


@needs_intel_openmp
def test_a_replica_computes_with_the_openmp_that_gives_way() -> None:
    printed = stderr_of(COMPUTES, KMP_VERSION="1", KMP_SETTINGS="1")
    assert "Intel(R) OMP" in printed
    assert "KMP_BLOCKTIME=100us" in printed


def test_a_process_that_is_no_replica_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_intel_openmp", lambda: pytest.fail("it was looked for"))
    monkeypatch.delenv("BLIP2_SERVE_REPLICA", raising=False)
    environment.prepare_replica()


def test_threads_sleep_where_there_is_no_openmp_that_gives_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment, "_intel_openmp", lambda: None)
    monkeypatch.setenv("BLIP2_SERVE_REPLICA", "1")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    environment.prepare_replica()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_nothing_of_the_building_machine_is_sent_to_the_nodes() -> None:
    assert not any("/" in value for value in environment.REPLICA.values())
    assert "LD_PRELOAD" not in environment.REPLICA  # a user's own stays


@needs_intel_openmp
def test_the_openmp_of_a_folder_with_a_blank_is_loaded(tmp_path: Path) -> None:
    library = environment._intel_openmp()
    assert library is not None
    copy = tmp_path / "my dir" / library.name
    copy.parent.mkdir()
    shutil.copy(library, copy)
    code = f"""
from pathlib import Path
from blip2_serve import environment
environment._intel_openmp = lambda: Path({str(copy)!r})
environment.prepare_replica()
assert {str(copy)!r} in open("/proc/self/maps").read()
"""
    assert stderr_of(code) == ""
