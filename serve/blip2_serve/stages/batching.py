"""A thread that computes whatever is waiting, as one batch. It knows neither Ray nor torch.

Serve's own batching waits on the event loop and then asks a pool for a thread. Here the thread
itself waits, which is a wake-up less, and what nobody wants any more is not computed.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, TypeVar

from blip2_serve.observe.metrics import harmless

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Batch:
    """A batch that was computed."""

    seconds: float
    waited: tuple[float, ...]  # seconds, of each item
    dropped: int  # items before it that nobody wanted any more


@dataclass
class _Waiting(Generic[Item, Result]):
    item: Item
    since: float  # as time.perf_counter() counts
    result: asyncio.Future[Result]


class BatchThread(Generic[Item, Result]):
    """Calls `compute` with whatever is waiting, up to `limit` items; never waits for a second one.

    In the same thread, `prepare` is called first, and `observe` after each batch, before its
    results are told; what `observe` raises is logged. `failure` is what the last batch raised, None
    if it succeeded. Used from the event loop that it is made on.
    """

    def __init__(
        self,
        prepare: Callable[[], None],
        compute: Callable[[list[Item]], list[Result]],
        limit: int,
        observe: Callable[[Batch], None] = lambda _: None,
    ) -> None:
        self._prepare = prepare
        self._compute = compute
        self._limit = limit
        self._observe = harmless(observe)
        self.failure: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._waiting: SimpleQueue[_Waiting[Item, Result]] = SimpleQueue()
        self.prepared: asyncio.Future[None] = self._loop.create_future()
        threading.Thread(target=self._run, name="batches", daemon=True).start()

    @property
    def waiting(self) -> int:
        """How many items no batch has taken yet."""
        return self._waiting.qsize()

    async def result_of(self, item: Item) -> Result:
        """What `compute` returns for this item, or raises for its batch."""
        future: asyncio.Future[Result] = self._loop.create_future()
        self._waiting.put(_Waiting(item, time.perf_counter(), future))
        return await future

    def _run(self) -> None:
        try:
            self._prepare()
        except BaseException as error:  # Rust's panics among them: whoever waits must hear of it
            self._loop.call_soon_threadsafe(_fail, [self.prepared], error)
            return
        self._loop.call_soon_threadsafe(_answer, [self.prepared], [None])
        while True:
            batch, dropped = self._next_batch()
            futures = [waiting.result for waiting in batch]
            start = time.perf_counter()
            try:
                results = self._compute([waiting.item for waiting in batch])
            except BaseException as error:
                self.failure = error if isinstance(error, Exception) else RuntimeError(repr(error))
                self._loop.call_soon_threadsafe(_fail, futures, self.failure)
                continue
            self.failure = None
            waited = tuple(start - waiting.since for waiting in batch)
            self._observe(Batch(time.perf_counter() - start, waited, dropped))
            self._loop.call_soon_threadsafe(_answer, futures, results)

    def _next_batch(self) -> tuple[list[_Waiting[Item, Result]], int]:
        """And how many were passed over, since their caller had left."""
        batch: list[_Waiting[Item, Result]] = []
        dropped = 0
        while not batch or (len(batch) < self._limit and not self._waiting.empty()):
            waiting = self._waiting.get()
            if waiting.result.cancelled():
                dropped += 1
            else:
                batch.append(waiting)
        return batch, dropped


def _answer(futures: list[asyncio.Future[Result]], results: list[Result]) -> None:
    for future, result in zip(futures, results, strict=True):
        if not future.cancelled():
            future.set_result(result)


def _fail(futures: list[asyncio.Future[Result]], error: BaseException) -> None:
    for future in futures:
        if not future.cancelled():
            future.set_exception(error)
