"""Images are decoded in processes: real ones here, some of which misbehave on demand."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from blip2_serve.config import AppConfig
from blip2_serve.errors import InvalidImage, StartupError, TimedOut
from blip2_serve.model.decode_worker import Limits
from blip2_serve.model.pictures import png
from blip2_serve.model.processor import ImageProcessor
from blip2_serve.model.source import DEMO_FOLDER, DEMO_PICTURE
from blip2_serve.stages import decoding
from blip2_serve.stages.decoding import DecodePool
from blip2_serve.stages.preprocessor import Preprocessor
from blip2_serve.types import Call
from support.images import encode
from support.replicas import replica

PROCESSOR = ImageProcessor.load(DEMO_FOLDER)
LIMITS = Limits(pixels=40_000_000, seconds=5, memory=1280 << 20)
ODD = "support.odd_decoder"
GOOD = DEMO_PICTURE.read_bytes()


@asynccontextmanager
async def pool_of(
    workers: int, limits: Limits = LIMITS, module: str = ODD
) -> AsyncIterator[DecodePool]:
    pool = DecodePool(PROCESSOR, workers, limits, module)
    try:
        await pool.start()
        yield pool
    finally:
        pool.close()


OTHERS: set[int] = set()  # processes that other tests have started


@pytest.fixture(autouse=True)
def others() -> None:
    OTHERS.clear()
    OTHERS.update(child.pid for child in psutil.Process().children())


def children() -> dict[int, psutil.Process]:
    found = psutil.Process().children()
    return {child.pid: child for child in found if child.pid not in OTHERS}


def large(command: bytes, side: int = 6000) -> bytes:
    """A file that looks like a PNG of so many pixels to the queue."""
    return png.SIGNATURE + struct.pack(">L4s2L", 13, b"IHDR", side, side) + b"do:" + command


def pipe(folder: Path, name: str) -> Path:
    path = folder / name
    os.mkfifo(path)
    return path


async def release(path: Path) -> None:
    """Lets go the decoder that waits for this pipe, once it does."""
    await asyncio.to_thread(path.write_bytes, b"")


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def refused(pool: DecodePool, data: bytes) -> InvalidImage:
    with pytest.raises(InvalidImage) as caught:
        await pool.decode(data)
    return caught.value


# -- what an image becomes -------------------------------------------------------------------------


async def test_pixels_and_faults_are_those_of_the_processor() -> None:
    limits = Limits(pixels=1_000_000, seconds=5, memory=1280 << 20)
    async with pool_of(1, limits, "blip2_serve.model.decode_worker") as pool:
        decoded = await pool.decode(GOOD)
        assert np.array_equal(decoded.pixels, PROCESSOR.pixels(GOOD))
        assert decoded.pixels.dtype == np.uint8
        assert decoded.waited >= 0
        assert decoded.seconds > 0

        assert (await refused(pool, b"")).kind == "format"
        assert (await refused(pool, GOOD[:200])).kind == "truncated"
        error = await refused(pool, encode(Image.new("L", (2000, 1000))))
        assert error.kind == "pixels"
        assert "2000 x 1000 pixels; the maximum is 1,000,000 pixels" in error.message


async def test_a_file_of_many_megabytes_goes_through() -> None:
    data = GOOD + bytes(20 << 20)
    async with pool_of(1) as pool:
        decoded = await pool.decode(data)
    assert np.array_equal(decoded.pixels, PROCESSOR.pixels(data))


async def test_what_the_decoder_logs_is_logged_here(caplog: pytest.LogCaptureFixture) -> None:
    async with pool_of(1) as pool:
        assert (await refused(pool, b"do:bug")).message == "unusable"
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "it failed\nTraceback" in record.getMessage()
    assert "KeyError: 'a bug'" in record.getMessage()


# -- an image that does harm -----------------------------------------------------------------------


@pytest.mark.parametrize("command", [b"crash", b"nonsense"])
async def test_an_image_that_breaks_its_worker_fails_alone(command: bytes, tmp_path: Path) -> None:
    gate = pipe(tmp_path, "gate")
    async with pool_of(2) as pool:
        before = children()
        other = asyncio.create_task(pool.decode(b"do:wait " + bytes(gate)))
        await asyncio.sleep(0)

        error = await refused(pool, b"do:" + command)
        assert error.kind == "crash"
        assert "another format" in error.message

        await pool.decode(GOOD)
        await release(gate)
        await other
        assert len(children()) == 2
        assert len(children().keys() & before.keys()) == 1


@pytest.mark.parametrize(
    ("command", "seconds", "factor"),
    [
        pytest.param(b"spin", 0.2, 1000, id="by its CPU time"),
        pytest.param(b"sleep", 0.5, 1, id="by the clock"),
    ],
)
async def test_an_image_that_hangs_its_worker_fails_alone(
    command: bytes, seconds: float, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "CLOCK_FACTOR", factor)
    async with pool_of(1, Limits(40_000_000, seconds, 1280 << 20)) as pool:
        error = await refused(pool, b"do:" + command)
        assert error.kind == "timeout"
        assert f"longer than {seconds} seconds" in error.message

        monkeypatch.setattr(decoding, "CLOCK_FACTOR", 1000)
        await pool.decode(GOOD)


async def test_an_image_that_takes_too_much_memory_fails_alone() -> None:
    async with pool_of(1, Limits(40_000_000, 5, 128 << 20)) as pool:
        before = children()
        error = await refused(pool, encode(Image.new("RGBA", (5000, 5000))))
        assert error.kind == "memory"
        assert "more memory" in error.message

        await pool.decode(GOOD)
        assert children().keys() == before.keys()


async def test_a_worker_that_dies_idle_costs_no_image() -> None:
    async with pool_of(1) as pool:
        (worker,) = children().values()
        worker.kill()
        await until(lambda: worker.status() == psutil.STATUS_ZOMBIE)
        await pool.decode(GOOD)


async def test_crashes_leave_no_files_open() -> None:
    async with pool_of(2) as pool:
        before = os.listdir("/proc/self/fd")
        await asyncio.gather(*(refused(pool, b"do:crash") for _ in range(8)))
        await until(lambda: len(pool._idle) == 2)
        assert len(os.listdir("/proc/self/fd")) == len(before)
        assert len(children()) == 2


async def test_a_worker_that_cannot_be_replaced_is_reported_until_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoding, "RESTART_PAUSE_S", 0.01)
    async with pool_of(1) as pool:
        pool._module = "support.no_such_module"
        await refused(pool, b"do:crash")
        await until(lambda: pool.failure)

        pool._module = ODD
        await pool.decode(GOOD)
        assert pool.failure is None


# -- whose turn it is ------------------------------------------------------------------------------


async def test_a_small_image_is_not_stuck_behind_large_ones(tmp_path: Path) -> None:
    gates = [pipe(tmp_path, f"gate{i}") for i in range(3)]
    async with pool_of(2) as pool:
        giants = [asyncio.create_task(pool.decode(large(b"wait " + bytes(g)))) for g in gates]
        await asyncio.sleep(0)

        await pool.decode(GOOD)  # while all large ones are there, and the first is under way

        assert not any(giant.done() for giant in giants)
        for gate, giant in zip(gates, giants, strict=True):
            await release(gate)
            await giant


async def test_one_worker_takes_large_images_too() -> None:
    async with pool_of(1) as pool:
        await asyncio.gather(pool.decode(large(b"touch /dev/null")), pool.decode(GOOD))


async def test_the_quick_ones_go_first(tmp_path: Path) -> None:
    gate, done = pipe(tmp_path, "gate"), []

    async def decode(name: str, data: bytes) -> None:
        await pool.decode(data)
        done.append(name)

    async with pool_of(1) as pool, asyncio.TaskGroup() as group:
        group.create_task(decode("first", b"do:wait " + bytes(gate)))
        for side in (3000, 6000, 100, 1000):
            group.create_task(decode(f"{side}", large(b"touch /dev/null", side)))
        await asyncio.sleep(0)
        await release(gate)
    assert done == ["first", "100", "1000", "3000", "6000"]


async def test_a_large_image_is_overtaken_only_for_a_time() -> None:
    future = asyncio.get_running_loop().create_future()
    giant = decoding._Job(large(b""), None, future, arrived=100.0)
    patience = giant.rank - giant.arrived
    assert patience > 5
    soon, late = (
        decoding._Job(GOOD, None, future, arrived=100.0 + share * patience) for share in (0.9, 1.1)
    )
    queue = decoding._Queue()
    for job in (late, giant, soon):
        queue.put(job)

    assert [queue.get(large=True) for _ in range(4)] == [soon, giant, late, None]


async def test_an_image_whose_caller_has_left_is_not_decoded(tmp_path: Path) -> None:
    gate, trace = pipe(tmp_path, "gate"), tmp_path / "trace"
    async with pool_of(1) as pool:
        first = asyncio.create_task(pool.decode(b"do:wait " + bytes(gate)))
        left = asyncio.create_task(pool.decode(b"do:touch " + bytes(trace)))
        await asyncio.sleep(0)
        left.cancel()
        await release(gate)
        await first
        await pool.decode(GOOD)
        assert left.cancelled()
        assert not trace.exists()


async def test_an_image_under_way_whose_caller_has_left_harms_nobody(tmp_path: Path) -> None:
    gate = pipe(tmp_path, "gate")
    async with pool_of(1) as pool:
        left = asyncio.create_task(pool.decode(b"do:wait " + bytes(gate)))
        await asyncio.sleep(0)
        left.cancel()
        await release(gate)
        await pool.decode(GOOD)


async def test_an_image_whose_time_is_over_is_not_decoded(tmp_path: Path) -> None:
    gate, trace = pipe(tmp_path, "gate"), tmp_path / "trace"
    async with pool_of(1) as pool:
        first = asyncio.create_task(pool.decode(b"do:wait " + bytes(gate)))
        await asyncio.sleep(0)
        late = asyncio.create_task(pool.decode(b"do:touch " + bytes(trace), seconds_left=0.0))
        patient = asyncio.create_task(pool.decode(GOOD, seconds_left=1000.0))
        await asyncio.sleep(0)
        await release(gate)
        with pytest.raises(TimedOut, match="before its image was decoded"):
            await late
        await asyncio.gather(first, patient)
        assert not trace.exists()


# -- starting and ending ---------------------------------------------------------------------------


async def test_a_pool_whose_workers_cannot_start_says_so(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(StartupError, match=r"exit code 1.*on standard error"):
        async with pool_of(2, module="support.no_such_module"):
            pass
    assert "no_such_module" in capfd.readouterr().err
    assert not children()


async def test_closing_ends_the_processes(tmp_path: Path) -> None:
    async with pool_of(2) as pool:
        busy = asyncio.create_task(pool.decode(b"do:wait " + bytes(pipe(tmp_path, "gate"))))
        await asyncio.sleep(0)
    assert not children()
    busy.cancel()


PARENT = """
import asyncio
import sys
from pathlib import Path

from blip2_serve.model.decode_worker import Limits
from tests.unit.stages.test_decoding import children, pool_of, until

async def main():
    trace = Path(sys.argv[1])
    async with pool_of(2, Limits(pixels=1, seconds=1000, memory=1 << 30)) as pool:
        hanging = asyncio.create_task(pool.decode(b"do:spin " + bytes(trace)))
        await until(trace.exists)  # now one worker is idle, the other deaf
        print(*children(), flush=True)
        await hanging

asyncio.run(main())
"""


@pytest.mark.slow
def test_workers_end_with_a_replica_that_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "trace")],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as parent:
        assert parent.stdout
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        parent.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


# -- the stage -------------------------------------------------------------------------------------


async def test_a_preprocessor_minds_the_calls_time() -> None:
    preprocessor, started = replica(Preprocessor, AppConfig())
    await started
    call = Call("id", seconds_left=100)
    assert (await preprocessor.pixels(GOOD, call=call)).values.shape == (3, *PROCESSOR.size)
    with pytest.raises(TimedOut):
        await preprocessor.pixels(GOOD, call=Call("id", seconds_left=0))
    await preprocessor.check_health()


async def test_a_preprocessor_without_workers_is_unhealthy() -> None:
    preprocessor, started = replica(Preprocessor, AppConfig())
    await started
    preprocessor._pool.failure = StartupError("no memory")
    with pytest.raises(StartupError, match="no memory"):
        await preprocessor.check_health()


async def test_a_preprocessor_keeps_its_limits() -> None:
    settings = {"max_pixels": 100, "decode_memory_mb": 500, "decode_timeout_s": 2}
    preprocessor, started = replica(
        Preprocessor, AppConfig.model_validate({"preprocessor": settings})
    )
    await started
    with pytest.raises(InvalidImage, match="the maximum is 100 pixels"):
        await preprocessor.pixels(GOOD)
    assert preprocessor._pool._limits == Limits(100, 2, 500 << 20)
