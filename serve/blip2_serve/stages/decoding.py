"""Decodes images in worker processes: the quick ones first, each within limits.

An image that crashes or hangs its worker, or asks for too much memory, fails alone; its worker is
replaced. `model/decode_worker.py` is what runs in the processes. Needs neither Ray nor torch.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Coroutine
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from blip2_serve.concurrency import gather
from blip2_serve.errors import InvalidImage, StartupError, TimedOut
from blip2_serve.model import decode_worker
from blip2_serve.model.decode_worker import ANSWER, READY, REQUEST, Limits, Task
from blip2_serve.model.pictures.cost import expected_seconds
from blip2_serve.model.processor import ImageProcessor

logger = logging.getLogger(__name__)

# An image lets those pass that come this many times its own expected time later and take no time.
# So large images wait for small ones, but not forever.
PATIENCE = 10

# Images that are expected to take longer never occupy all workers.
LARGE_S = 0.2

# Times the limit of CPU seconds that an image may take by the clock: the machine may be busy.
CLOCK_FACTOR = 4

START_TIMEOUT_S = 120.0
RESTART_PAUSE_S = 1.0
_MAX_FAULT = 1 << 20  # bytes of an answer without pixels


class Decoded(NamedTuple):
    """Pixels, uint8 [3, height, width], the seconds that their file waited, and those it took."""

    pixels: NDArray[np.uint8]
    waited: float
    seconds: float


@dataclass(eq=False)
class _Job:
    """An image file and who waits for it. Times are those of `time.perf_counter`."""

    data: bytes
    deadline: float | None
    result: asyncio.Future[Decoded]
    arrived: float = field(default_factory=time.perf_counter)
    # Log lines of the worker's task name the request of the image.
    context: contextvars.Context = field(default_factory=contextvars.copy_context)

    def __post_init__(self) -> None:
        expected = expected_seconds(self.data)
        self.is_large = expected > LARGE_S
        self.rank = self.arrived + PATIENCE * expected


class _Queue:
    """Jobs by rank. Large ones can be left out."""

    def __init__(self) -> None:
        self._heaps: dict[bool, list[tuple[float, int, _Job]]] = {False: [], True: []}
        self._numbers = itertools.count()  # decide between equal ranks

    def put(self, job: _Job) -> None:
        heapq.heappush(self._heaps[job.is_large], (job.rank, next(self._numbers), job))

    def get(self, *, large: bool) -> _Job | None:
        """Takes out the first job; only a large one if `large`."""
        heaps = [self._heaps[False], self._heaps[True]] if large else [self._heaps[False]]
        first = min(filter(None, heaps), key=lambda heap: heap[0], default=None)
        return heapq.heappop(first)[-1] if first else None

    def remove(self, job: _Job) -> None:
        """Removes a job if it is there."""
        heap = [entry for entry in self._heaps[job.is_large] if entry[-1] is not job]
        heapq.heapify(heap)
        self._heaps[job.is_large] = heap


class DecodePool:
    """Worker processes, kept warm, and the queue in front of them. Use it on one event loop.

    `failure` is why a lost worker cannot be replaced, None while all is well.

    Args:
        processor: Gives the size of the pixels.
        workers: How many processes, each of which decodes one image at a time.
        limits: What each image may take.
        module: What the processes run.
    """

    def __init__(
        self,
        processor: ImageProcessor,
        workers: int,
        limits: Limits,
        module: str = decode_worker.__name__,
    ) -> None:
        self._processor = processor
        self._workers = workers
        self._limits = limits
        self._module = module
        self.failure: Exception | None = None
        self._queue = _Queue()
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._large = 0  # being decoded
        self._most_large = max(1, workers - 1)

    async def start(self) -> None:
        """Starts the processes and waits until they can take images.

        Raises:
            StartupError: One of them cannot start.
        """
        try:
            self._idle = await gather(self._start_worker() for _ in range(self._workers))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the processes. Images that are being decoded, or wait, never get an answer."""
        for task in self._tasks:
            task.cancel()
        for worker in self._all:
            worker.kill()
        for worker in self._all:
            worker.process.wait()
        self._all.clear()
        self._idle.clear()

    async def decode(self, data: bytes, seconds_left: float | None = None) -> Decoded:
        """Returns an image file's pixels. `seconds_left`: after these, nobody wants them any more.

        Raises:
            InvalidImage: The file is unusable, or went beyond a limit.
            TimedOut: `seconds_left` were over when its turn came.
        """
        deadline = None if seconds_left is None else time.perf_counter() + seconds_left
        job = _Job(data, deadline, asyncio.get_running_loop().create_future())
        self._queue.put(job)
        self._dispatch()
        try:
            return await job.result
        except asyncio.CancelledError:
            self._queue.remove(job)
            raise

    def _dispatch(self) -> None:
        """Gives jobs to idle workers."""
        while self._idle and (job := self._queue.get(large=self._large < self._most_large)):
            if job.result.done():
                continue  # its caller has just left
            if job.deadline is not None and job.deadline <= time.perf_counter():
                job.result.set_exception(
                    TimedOut("the time for this request was over before its image was decoded")
                )
                continue
            self._large += job.is_large
            self._spawn(self._work(self._idle.pop(), job), job.context)

    def _spawn(self, work: Coroutine[Any, Any, None], context: contextvars.Context) -> None:
        task = asyncio.get_running_loop().create_task(work, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _work(self, worker: _Worker, job: _Job) -> None:
        """Decodes one image; then the worker, or another in its place, is idle again."""
        if worker.process.poll() is not None:  # killed from outside: not this image's fault
            worker = await self._replace(worker)
        is_lost = False
        start = time.perf_counter()
        result: Decoded | InvalidImage
        try:
            async with asyncio.timeout(CLOCK_FACTOR * self._limits.seconds):
                pixels = await worker.decode(job.data)
            result = Decoded(pixels, start - job.arrived, time.perf_counter() - start)
        except InvalidImage as error:
            result = error
        except Exception as error:  # the worker is gone, or its answer is nonsense
            is_lost = True
            result = await self._fault(worker, error)
            logger.warning("an image file of %d bytes: %s", len(job.data), result.message)
        if not job.result.done():
            if isinstance(result, InvalidImage):
                job.result.set_exception(result)
            else:
                job.result.set_result(result)
        del result
        if is_lost:
            worker = await self._replace(worker)
        self._large -= job.is_large
        self._idle.append(worker)
        self._dispatch()

    async def _fault(self, worker: _Worker, error: Exception) -> InvalidImage:
        """Ends a worker that failed at an image; returns what to say about that image."""
        await worker.end()
        if isinstance(error, TimeoutError) or worker.process.returncode == -signal.SIGPROF:
            return InvalidImage(
                f"decoding the image takes longer than {self._limits.seconds:g} seconds; send a "
                "smaller or simpler one",
                kind="timeout",
            )
        return InvalidImage(
            "the image makes its decoder crash; send an intact copy, or another format",
            kind="crash",
        )

    async def _replace(self, worker: _Worker) -> _Worker:
        """Starts a new worker; tries until that succeeds."""
        self._all.discard(worker)
        await worker.end()
        while True:
            try:
                started = await self._start_worker()
            except (StartupError, OSError) as error:
                logger.error("cannot replace a decoder process: %s", error)
                self.failure = error
                await asyncio.sleep(RESTART_PAUSE_S)
            else:
                self.failure = None
                return started

    async def _start_worker(self) -> _Worker:
        worker = _Worker(self._module, self._processor, self._limits)
        self._all.add(worker)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await worker.ready()
        except (OSError, TimeoutError) as error:
            self._all.discard(worker)
            await worker.end()
            raise StartupError(
                f"a decoder process did not start (exit code {worker.process.returncode}); its "
                "own messages are on standard error"
            ) from error
        return worker


class _Worker:
    """A process, and this side of its socket."""

    def __init__(self, module: str, processor: ImageProcessor, limits: Limits) -> None:
        self._shape = (3, *processor.size)
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        task = Task(
            theirs.fileno(), os.getpid(), processor.size, processor.resample, asdict(limits)
        )
        # It imports from where this process does, and one thread of numpy's is plenty.
        variables = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        with theirs:
            self.process = subprocess.Popen(  # noqa: S603 (our own module)
                [sys.executable, "-P", "-m", module, task.to_json()],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | variables,
                start_new_session=True,  # Ctrl-C in a terminal is for the server
            )

    async def ready(self) -> None:
        """
        Raises:
            OSError: The process has ended.
        """
        await self._receive(memoryview(bytearray(len(READY))))

    async def decode(self, data: bytes) -> NDArray[np.uint8]:
        """
        Raises:
            InvalidImage: The file is unusable.
            Exception: The process has ended, or answers nonsense.
        """
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._socket, REQUEST.pack(len(data)))
        await loop.sock_sendall(self._socket, data)
        head = bytearray(ANSWER.size)
        await self._receive(memoryview(head))
        is_image, length = ANSWER.unpack(head)
        if is_image:
            pixels = np.empty(self._shape, np.uint8)
            if length != pixels.nbytes:
                raise ValueError(f"{length} bytes of pixels instead of {pixels.nbytes}")
            await self._receive(pixels.data.cast("B"))
            return pixels
        if length > _MAX_FAULT:
            raise ValueError(f"{length} bytes to say what is wrong")
        body = bytearray(length)
        await self._receive(memoryview(body))
        fault = json.loads(body)
        if fault["log"]:
            logger.error("%s", fault["log"].rstrip())
        raise InvalidImage(fault["message"], kind=fault["kind"])

    async def _receive(self, into: memoryview) -> None:
        loop = asyncio.get_running_loop()
        while into:
            received = await loop.sock_recv_into(self._socket, into)
            if not received:
                raise ConnectionResetError("the process has ended")
            into = into[received:]

    def kill(self) -> None:
        self.process.kill()
        self._socket.close()

    async def end(self) -> None:
        """Kills the process, if it still runs, and waits until it has ended."""
        self.kill()
        await asyncio.to_thread(self.process.wait)
