"""A thread that computes whatever is waiting as one batch. Needs neither Ray nor torch.

Serve's own batching waits on the event loop and then asks a pool for a thread. Here the thread
itself waits, which saves a wake-up, and items whose callers have left are not computed.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, TypeVar

from blip2_serve.engine.progress import Progress
from blip2_serve.errors import Blip2ServeError, TimedOut
from blip2_serve.observe.instruments import Batch
from blip2_serve.observe.metrics import harmless

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class _Entry(Generic[Item, Result]):
    """An item in the queue."""

    item: Item
    enqueued: float  # by the clock, as `expires`
    expires: float | None
    result: asyncio.Future[Result]


class BatchThread(Generic[Item, Result]):
    """Computes batches of up to `limit` items in a thread; never waits for a batch to fill up.

    Make it and use it on one event loop. `prepared` is done once `prepare` has returned, or has
    what it raised. `failure` is what the last batch raised, None if it succeeded.

    Args:
        prepare: called first, in the thread.
        compute: called in the thread with the items of a batch; returns their results in order, or
            for an item that alone has failed, the error.
        limit: the most items of a batch.
        observe: called in the thread after each successful batch, before its results are delivered.
            What it raises is logged.
        clock: tells the seconds that an item's time is compared with.
    """

    def __init__(
        self,
        prepare: Callable[[], None],
        compute: Callable[[list[Item]], Sequence[Result | Blip2ServeError]],
        limit: int,
        observe: Callable[[Batch], None] = lambda _: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._prepare = prepare
        self._compute = compute
        self._limit = limit
        self._observe = harmless(observe)
        self._clock = clock
        self._progress = Progress(clock, limit)
        self.failure: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._queue: SimpleQueue[_Entry[Item, Result]] = SimpleQueue()
        self.prepared: asyncio.Future[None] = self._loop.create_future()
        threading.Thread(target=self._run, name="batches", daemon=True).start()

    @property
    def waiting(self) -> int:
        """How many items no batch has taken yet."""
        return self._queue.qsize()

    @property
    def stalled_s(self) -> float:
        """Seconds that the current batch has taken, or that items wait for one; 0 when idle."""
        return self._progress.stalled_s

    @property
    def usual_s(self) -> float:
        """Seconds that a full batch may take, going by the recent ones; 0 before the first."""
        return self._progress.usual_s

    async def result_of(self, item: Item, expires: float | None = None) -> Result:
        """Returns the item's result, or raises what its batch raised.

        A batch that raises no `Exception` (a panic of a Rust library) becomes a RuntimeError.

        Raises:
            TimedOut: no batch had taken it at `expires`, by the clock. It is not computed then.
        """
        future: asyncio.Future[Result] = self._loop.create_future()
        self._progress.wait()
        self._queue.put(_Entry(item, self._clock(), expires, future))
        return await future

    def _run(self) -> None:
        try:
            self._prepare()
        except BaseException as error:  # panics of Rust libraries too: the caller must hear of it
            self._loop.call_soon_threadsafe(_fail, [self.prepared], error)
            return
        self._loop.call_soon_threadsafe(_deliver, [self.prepared], [None])
        while True:
            entries, dropped, expired = self._next_batch()
            futures = [entry.result for entry in entries]
            start = self._clock()
            self._progress.begin()
            try:
                results = self._compute([entry.item for entry in entries])
            except BaseException as error:
                self.failure = error if isinstance(error, Exception) else RuntimeError(repr(error))
                self._loop.call_soon_threadsafe(_fail, futures, self.failure)
                continue
            finally:
                self._progress.end(len(entries))
            self.failure = None
            waited = tuple(start - entry.enqueued for entry in entries)
            self._observe(Batch(self._clock() - start, waited, dropped, expired))
            self._loop.call_soon_threadsafe(_deliver, futures, results)

    def _next_batch(self) -> tuple[list[_Entry[Item, Result]], int, int]:
        """Waits for an item and returns a batch.

        Also how many items were skipped because their callers had left, or their time was over.
        """
        entries: list[_Entry[Item, Result]] = []
        dropped = expired = 0
        while not entries or (len(entries) < self._limit and not self._queue.empty()):
            if self._queue.empty():
                self._progress.idle()
            entry = self._queue.get()
            if entry.result.cancelled():
                dropped += 1
            elif entry.expires is not None and entry.expires <= self._clock():
                expired += 1
                late = TimedOut("the time of the request was over before its turn came")
                self._loop.call_soon_threadsafe(_fail, [entry.result], late)
            else:
                entries.append(entry)
        return entries, dropped, expired


def _deliver(
    futures: list[asyncio.Future[Result]], results: Sequence[Result | Blip2ServeError]
) -> None:
    for future, result in zip(futures, results, strict=True):
        if isinstance(result, Blip2ServeError):
            _fail([future], result)
        elif not future.cancelled():
            future.set_result(result)


def _fail(futures: list[asyncio.Future[Result]], error: BaseException) -> None:
    for future in futures:
        if not future.cancelled():
            future.set_exception(error)
