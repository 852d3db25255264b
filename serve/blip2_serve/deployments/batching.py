"""A thread that computes whatever is waiting, as one batch. It knows neither Ray nor torch.

Serve's own batching waits on the event loop and then asks a pool for a thread. Here the thread
itself waits, which is a wake-up less, and what nobody wants any more is not computed.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class BatchThread(Generic[Item, Result]):
    """Calls `compute` with whatever is waiting, up to `limit` items; never waits for a second one.

    `prepare` is called first, in the same thread. Used from the event loop that it is made on.
    """

    def __init__(
        self,
        prepare: Callable[[], None],
        compute: Callable[[list[Item]], list[Result]],
        limit: int,
    ) -> None:
        self._prepare = prepare
        self._compute = compute
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._waiting: SimpleQueue[tuple[Item, asyncio.Future[Result]]] = SimpleQueue()
        self.prepared: asyncio.Future[None] = self._loop.create_future()
        self.dropped = 0  # items whose caller had left before they were computed
        threading.Thread(target=self._run, name="batches", daemon=True).start()

    @property
    def waiting(self) -> int:
        """Items that are not computed yet, the current batch aside."""
        return self._waiting.qsize()

    async def result_of(self, item: Item) -> Result:
        """What `compute` returns for this item, or raises for its batch."""
        future: asyncio.Future[Result] = self._loop.create_future()
        self._waiting.put((item, future))
        return await future

    def _run(self) -> None:
        try:
            self._prepare()
        except Exception as error:
            self._loop.call_soon_threadsafe(_fail, [self.prepared], error)
            return
        self._loop.call_soon_threadsafe(_answer, [self.prepared], [None])
        while True:
            batch = self._next_batch()
            futures = [future for _, future in batch]
            try:
                results = self._compute([item for item, _ in batch])
            except Exception as error:
                self._loop.call_soon_threadsafe(_fail, futures, error)
            else:
                self._loop.call_soon_threadsafe(_answer, futures, results)

    def _next_batch(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        while not batch or (len(batch) < self._limit and not self._waiting.empty()):
            item, future = self._waiting.get()
            if future.cancelled():
                self.dropped += 1
            else:
                batch.append((item, future))
        return batch


def _answer(futures: list[asyncio.Future[Result]], results: list[Result]) -> None:
    for future, result in zip(futures, results, strict=True):
        if not future.cancelled():
            future.set_result(result)


def _fail(futures: list[asyncio.Future[Result]], error: Exception) -> None:
    for future in futures:
        if not future.cancelled():
            future.set_exception(error)
