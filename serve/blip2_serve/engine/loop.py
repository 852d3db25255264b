"""The engine's thread, and the way to it from asyncio.

The engine blocks for the length of a step; on the replica's event loop it would stall health
checks and every other request, so it runs in a thread of its own. Requests go in through an inbox;
each step's events come back to the event loop in one call, whatever the number of requests.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from functools import partial

from blip2_serve.engine.engine import Engine, EngineStats
from blip2_serve.engine.sequence import Sequence
from blip2_serve.errors import Blip2ServeError, Unavailable
from blip2_serve.types import TokenEvent

logger = logging.getLogger(__name__)

_Item = TokenEvent | Blip2ServeError


class EngineLoop:
    """Runs `engine` in a thread; used from the event loop that it is made on."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._asyncio = asyncio.get_running_loop()
        self._queues: dict[str, asyncio.Queue[_Item]] = {}  # touched on the event loop only
        self._inbox: list[Callable[[], None]] = []
        self._wake = threading.Condition()
        self._closing = False
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def stream(self, sequence: Sequence) -> AsyncGenerator[TokenEvent, None]:
        """The answer as it comes; tokens that are ready together come as one event.

        Leaving early (`aclose`, cancellation) takes the sequence out before the next step.

        Raises:
            Overloaded, ContextLengthExceeded: as `Scheduler.add`.
            Unavailable: the engine has failed.
        """
        if self.failure:
            raise self._unavailable()
        queue = self._queues[sequence.id] = asyncio.Queue()
        self._post(partial(self._add, sequence))
        finished = False
        try:
            while not finished:
                event, failure = _take_all(await queue.get(), queue)
                if event is not None:
                    finished = event.finish_reason is not None
                    yield event
                if failure is not None and not finished:
                    finished = True  # nothing is left to abort
                    raise failure
        finally:
            del self._queues[sequence.id]
            if not finished:
                self._post(partial(self._engine.abort, sequence.id))

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def close(self) -> None:
        """Ends the thread after its current step."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _post(self, call: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(call)
            self._wake.notify()

    # -- in the engine's thread --------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._receive():
                events = self._engine.step() if self._engine.has_work else []
                if events:
                    self._call_soon(self._deliver, events)
        except BaseException as error:
            # Nothing can be trusted now: everyone is told, and the health check asks for a
            # new replica.
            logger.exception("the engine failed")
            self.failure = error
            self._call_soon(self._fail_all)

    def _receive(self) -> bool:
        """Runs what has come in, waiting while there is nothing to do; False at the end."""
        if not self._engine.has_work:
            self._engine.check_idle()
        with self._wake:
            if not self._engine.has_work:
                self._wake.wait_for(lambda: self._inbox or self._closing)
            calls, self._inbox = self._inbox, []
        for call in calls:
            call()
        return not self._closing

    def _add(self, sequence: Sequence) -> None:
        try:
            self._engine.add(sequence)
        except Blip2ServeError as error:
            self._call_soon(self._put, sequence.id, error)

    def _call_soon(self, callback: Callable[..., None], *args: object) -> None:
        try:
            self._asyncio.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the event loop is closed: nobody is left to tell
            logger.debug("event loop closed before the engine")

    # -- on the event loop -------------------------------------------------------------------

    def _deliver(self, events: list[tuple[str, TokenEvent]]) -> None:
        for sequence_id, event in events:
            self._put(sequence_id, event)

    def _put(self, sequence_id: str, item: _Item) -> None:
        queue = self._queues.get(sequence_id)
        if queue is not None:  # else its reader has gone
            queue.put_nowait(item)

    def _fail_all(self) -> None:
        for queue in self._queues.values():
            queue.put_nowait(self._unavailable())

    def _unavailable(self) -> Unavailable:
        return Unavailable(f"the generation engine has failed ({self.failure}); try again")


def _take_all(
    item: _Item, queue: asyncio.Queue[_Item]
) -> tuple[TokenEvent | None, Blip2ServeError | None]:
    """The item and all that is waiting behind it: tokens as one event, and the error at the end."""
    event: TokenEvent | None = None
    while isinstance(item, TokenEvent):
        event = item if event is None else event + item
        if queue.empty():
            return event, None
        item = queue.get_nowait()
    return event, item
