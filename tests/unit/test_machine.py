"""Cores and memory: what this process may use, not what the machine has."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from blip2_serve import machine
from blip2_serve.config import AppConfig
from blip2_serve.model.source import DEMO_PICTURE
from blip2_serve.stages.encoder import Encoder
from blip2_serve.stages.generator import Generator
from blip2_serve.stages.preprocessor import Preprocessor
from blip2_serve.types import SamplingParams
from support.replicas import replica

GIB = 1 << 30


@pytest.fixture
def large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 64 cores and 100 GiB, without limits."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(64)}, raising=False)
    memory = type("Memory", (), {"available": 100 * GIB})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def in_a_group(
    monkeypatch: pytest.MonkeyPatch, folder: Path, own: str, files: Mapping[str, str]
) -> None:
    """Puts this process into the control groups of `own`, whose folders have these files."""
    for name, text in files.items():
        path = folder / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "own").write_text(own)
    monkeypatch.setattr(machine, "CGROUPS", folder / "cgroup")
    monkeypatch.setattr(machine, "OWN_CGROUPS", folder / "own")


OWN_V2 = "0::/kubepods/pod/container\n"
OWN_V1 = "12:memory:/docker/abc\n7:cpu,cpuacct:/docker/abc\n0::/init\n"


@pytest.mark.usefixtures("large_machine")
@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        pytest.param(
            OWN_V2, {"kubepods/pod/container/cpu.max": "200000 100000\n"}, 2, id="own quota"
        ),
        pytest.param(
            OWN_V2,
            {
                "kubepods/pod/container/cpu.max": "max 100000\n",
                "kubepods/cpu.max": "350000 100000\n",
            },
            3,
            id="a quota of a group above, and a part of a core",
        ),
        pytest.param(OWN_V2, {"cpu.max": "400000 100000\n"}, 4, id="the root is the container's"),
        pytest.param(OWN_V2, {"cpu.max": "50000 100000\n"}, 1, id="half a core"),
        pytest.param(OWN_V2, {"cpu.max": "max 100000\n"}, 64, id="no quota"),
        pytest.param(
            OWN_V1,
            {
                "cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "600000\n",
                "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
            },
            6,
            id="version 1",
        ),
        pytest.param(
            OWN_V1,
            {
                "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            64,
            id="version 1 without a quota",
        ),
        pytest.param("", {}, 64, id="no control groups"),
    ],
)
def test_a_quota_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: str, files: dict[str, str], cores: int
) -> None:
    in_a_group(monkeypatch, tmp_path, own, files)
    assert machine.cores() == cores


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process choose its cores")
def test_the_affinity_of_a_process_counts() -> None:
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert machine.cores() == 1
    finally:
        os.sched_setaffinity(0, mine)


@pytest.mark.usefixtures("large_machine")
@pytest.mark.parametrize(
    ("own", "files", "available"),
    [
        pytest.param(
            OWN_V2,
            {
                "kubepods/pod/container/memory.max": f"{16 * GIB}\n",
                "kubepods/pod/container/memory.current": f"{15 * GIB}\n",
                "kubepods/pod/container/memory.stat": (
                    f"anon {GIB}\nfile {14 * GIB}\nshmem {2 * GIB}\n"
                    f"inactive_file {7 * GIB}\nactive_file {5 * GIB}\n"
                ),
            },
            13 * GIB,
            id="cached files make way",
        ),
        pytest.param(
            OWN_V2,
            {
                "kubepods/memory.max": f"{8 * GIB}\n",
                "kubepods/memory.current": f"{9 * GIB}\n",
                "kubepods/memory.stat": "inactive_file 0\n",
            },
            0,
            id="a group above has nothing left",
        ),
        pytest.param(
            OWN_V2,
            {"memory.max": "max\n", "memory.current": "5\n", "memory.stat": ""},
            100 * GIB,
            id="no limit",
        ),
        pytest.param(
            OWN_V1,
            {
                "memory/docker/abc/memory.limit_in_bytes": f"{4 * GIB}\n",
                "memory/docker/abc/memory.usage_in_bytes": f"{3 * GIB}\n",
                "memory/docker/abc/memory.stat": (
                    f"inactive_file 5\ntotal_inactive_file {GIB}\ntotal_active_file {GIB}\n"
                ),
            },
            3 * GIB,
            id="version 1",
        ),
        pytest.param(
            OWN_V1,
            {
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/memory.usage_in_bytes": f"{3 * GIB}\n",
                "memory/memory.stat": "total_inactive_file 0\n",
            },
            100 * GIB,
            id="version 1 without a limit",
        ),
    ],
)
def test_a_limit_of_memory_counts(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    own: str,
    files: dict[str, str],
    available: int,
) -> None:
    in_a_group(monkeypatch, tmp_path, own, files)
    assert machine.available_memory() == available


def test_the_numbers_of_this_machine_are_plausible() -> None:
    total = psutil.virtual_memory().total
    assert 0 < machine.anonymous_memory() < machine.available_memory() < total
    assert 1 <= machine.cores() <= (os.cpu_count() or 1)


def test_other_systems_than_linux_have_no_limits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "absent")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    resident = type("Memory", (), {"rss": 7})  # without `shared`, as on macOS
    monkeypatch.setattr(psutil.Process, "memory_info", lambda _: resident)
    assert machine.cores() == os.cpu_count()
    assert machine.anonymous_memory() == 7
    assert machine.available_memory() > 0


# -- priority --------------------------------------------------------------------------------------

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has it per thread")


def niceness_of(thread: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, thread)


def own_niceness() -> int:
    return niceness_of(os.getpid())


@needs_linux
def test_a_thread_gives_way_with_those_that_it_starts_and_no_other() -> None:
    before = own_niceness()
    expected = min(before + 10, 19)
    found = []

    def starts_another() -> None:
        machine.give_way()
        machine.give_way()  # the second call changes nothing
        found.append(niceness_of(0))
        other = threading.Thread(target=lambda: found.append(niceness_of(0)))
        other.start()
        other.join()

    thread = threading.Thread(target=starts_another)
    thread.start()
    thread.join()
    assert found == [expected, expected]
    assert own_niceness() == before


@needs_linux
async def test_what_computes_on_a_cpu_gives_way_to_what_serves() -> None:
    before = own_niceness()
    config = AppConfig(dtype="float32")
    preprocessor, started = replica(Preprocessor, config)
    encoder, loaded = replica(Encoder, config, "cpu")
    generator, ready = replica(Generator, config, "cpu")
    for start in (started, loaded, ready):  # two threads cannot import transformers at once
        await start
    pixels = await preprocessor.pixels(DEMO_PICTURE.read_bytes())
    features = await encoder.encode(pixels, "digest")
    await generator.generate(features, "", SamplingParams(max_tokens=2))
    threads = {thread.name: thread.native_id or 0 for thread in threading.enumerate()}
    computing = {name: niceness_of(threads[name]) for name in ("batches", "engine")}
    decoders = {
        child.nice()
        for child in psutil.Process().children()
        if any("decode_worker" in part for part in child.cmdline())
    }
    assert computing == dict.fromkeys(("batches", "engine"), min(before + 10, 19))
    assert decoders == {min(before + 10, 19)}
    assert own_niceness() == before


STARTS = """
import asyncio, os, sys
from blip2_serve.config import AppConfig
from blip2_serve.stages.{module} import {stage}

class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.getpriority(os.PRIO_PROCESS, 0))

sys.meta_path.insert(0, Watch())
replica = object.__new__({stage})
asyncio.run(replica.__init__(AppConfig(dtype="float32"), "cpu"))
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.slow
@needs_linux
@pytest.mark.parametrize(("module", "stage"), [("encoder", "Encoder"), ("generator", "Generator")])
def test_a_replica_that_starts_on_a_cpu_gives_way_before_it_imports_torch(
    module: str, stage: str
) -> None:
    code = STARTS.format(module=module, stage=stage)
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    assert {*map(int, done.stdout.split())} == {min(own_niceness() + 10, 19)}
