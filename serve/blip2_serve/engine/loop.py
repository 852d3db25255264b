"""Runs the engine in a thread and connects it to asyncio.

A step blocks; on the replica's event loop it would stall health checks and every other request.
Requests enter through an inbox. The events of a step return to the event loop in one call, however
many requests it served, and wait there until their reader is due: sending each token by itself
would slow down the next one.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from blip2_serve.engine.engine import Engine
from blip2_serve.engine.progress import Progress
from blip2_serve.engine.scheduler import Admission
from blip2_serve.engine.sequence import Request
from blip2_serve.engine.step import EngineStats, Event, Failure, StepReport, StepResult
from blip2_serve.errors import Blip2ServeError, Unavailable
from blip2_serve.observe.metrics import harmless
from blip2_serve.types import TokenEvent

logger = logging.getLogger(__name__)

_Item = TokenEvent | Blip2ServeError


@dataclass(frozen=True)
class Step:
    """A call of `Engine.step`, measured."""

    report: StepReport | None  # of the step whose tokens it took; None if there was none
    seconds: float
    admitted: tuple[Admission, ...]  # to the step that it launched
    queue_seconds: tuple[float, ...]  # per admitted request: the time since it was submitted
    answered: int  # answer tokens it returned
    expired: int = 0  # requests that it dropped because their time was over


@dataclass
class _Reader:
    """The consumer of one request's events, and the earliest time to wake it."""

    submitted: float  # time.perf_counter()
    due: float  # loop.time()
    queue_s: float = 0.0  # from when it was submitted until it was admitted
    waiting: list[_Item] = field(default_factory=list)
    woken: asyncio.Queue[list[_Item]] = field(default_factory=asyncio.Queue)


class EngineLoop:
    """Runs `engine` in a thread. Use it from the event loop it was created on.

    Wakes all streams together at most `events_per_s` times per second, not counting first tokens
    and ends, which never wait. The engine's thread calls `prepare_thread` first and `observe` after
    each step; exceptions from `observe` are logged. `clock` is what steps are measured by, to tell
    when one is stuck; the largest has `largest_step` tokens.
    """

    def __init__(
        self,
        engine: Engine,
        prepare_thread: Callable[[], None] = lambda: None,
        *,
        observe: Callable[[Step], None] = lambda _: None,
        events_per_s: float = math.inf,
        largest_step: float = 1.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._engine = engine
        self._prepare_thread = prepare_thread
        self._observe = observe
        self._measure = harmless(self._observe_step)
        self._events_per_s = events_per_s
        self._asyncio = asyncio.get_running_loop()
        self._readers: dict[str, _Reader] = {}  # changed on the event loop only
        self._streams = 0  # readers that want events as they come
        self._inbox: list[Callable[[], None]] = []
        self._wake = threading.Condition()
        self._closing = False
        self.failure: BaseException | None = None
        self._progress = Progress(clock, largest_step)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def stream(
        self, request: Request, *, whole: bool = False
    ) -> AsyncGenerator[TokenEvent, None]:
        """Yields the answers as they come or, with `whole`, one event per answer at the end.

        Tokens of one answer that are ready together make one event. Leaving early (`aclose`,
        cancellation) aborts the request before the next step.

        Raises:
            Overloaded, ContextLengthExceeded, InvalidRequest: as `Engine.add`.
            TimedOut: the request's time was over.
            Blip2ServeError: the model computed no finite numbers.
            Unavailable: the engine has failed, or is closed, or could not resume the answer.
        """
        if self.failure or self._closing:
            raise self._unavailable()
        reader = _Reader(time.perf_counter(), due=math.inf if whole else 0.0)
        self._readers[request.id] = reader
        self._streams += not whole
        self._post(partial(self._add, request))
        first, finished = True, False
        try:
            while not finished:
                events, failure = await _next(reader.woken)
                finished = failure is not None or events[-1].last
                for event in _merged(events):
                    if first:
                        event, first = replace(event, queue_s=reader.queue_s), False
                    yield event
                if failure is not None:
                    raise failure
        finally:
            del self._readers[request.id]
            self._streams -= not whole
            if not finished:
                self._post(partial(self._engine.abort, request.id))

    def stats(self) -> EngineStats:
        return self._engine.stats()

    @property
    def without_numbers(self) -> int:
        """Requests in a row, up to the last, whose logits were not finite."""
        return self._engine.without_numbers

    @property
    def stalled_s(self) -> float:
        """Seconds that the current step has taken, or that work waits for one; 0 when idle."""
        return self._progress.stalled_s

    @property
    def usual_s(self) -> float:
        """Seconds that the largest step may take, going by the recent ones; 0 before the first."""
        return self._progress.usual_s

    def close(self) -> None:
        """Stops the thread after its current step; requests under way fail as Unavailable."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _post(self, call: Callable[[], None]) -> None:
        with self._wake:
            self._progress.wait()
            self._inbox.append(call)
            self._wake.notify()

    # -- in the engine's thread --------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._prepare_thread()
            while self._receive():
                if self._engine.has_work:
                    self._step()
        except BaseException as error:
            # Its state cannot be trusted any more: the health check has the replica replaced.
            logger.exception("the engine failed")
            self.failure = error
        self._progress.idle()
        self._call_soon(self._fail_all)

    def _step(self) -> None:
        start = time.perf_counter()
        self._progress.begin()
        result = self._engine.step()
        self._progress.end(result.report.tokens if result.report else 1)
        for admission in result.admitted:
            if reader := self._readers.get(admission.request_id):
                reader.queue_s = start - reader.submitted
        if result.events or result.failures:
            self._call_soon(self._deliver, result.events, result.failures)
        self._measure(start, result)

    def _observe_step(self, start: float, result: StepResult) -> None:
        readers = (self._readers.get(admission.request_id) for admission in result.admitted)
        queue_seconds = tuple(reader.queue_s for reader in readers if reader)
        answered = sum(len(event.token_ids) for _, event in result.events)
        seconds = time.perf_counter() - start
        self._observe(
            Step(result.report, seconds, result.admitted, queue_seconds, answered, result.expired)
        )

    def _receive(self) -> bool:
        """Runs the calls in the inbox, waiting while there is nothing to do; False when closing."""
        if not self._engine.has_work:
            self._engine.check_idle()
        with self._wake:
            if not self._engine.has_work:
                if not self._inbox:
                    self._progress.idle()
                self._wake.wait_for(lambda: self._inbox or self._closing)
            calls, self._inbox = self._inbox, []
        for call in calls:
            call()
        return not self._closing

    def _add(self, request: Request) -> None:
        try:
            self._engine.add(request)
        except Blip2ServeError as error:
            self._call_soon(self._put, request.id, error)

    def _call_soon(self, callback: Callable[..., None], *args: object) -> None:
        try:
            self._asyncio.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the event loop is closed: there is no reader left
            logger.debug("event loop closed before the engine")

    # -- on the event loop -------------------------------------------------------------------

    def _deliver(self, events: list[Event], failures: list[Failure]) -> None:
        for request_id, event in events:
            self._put(request_id, event)
        for request_id, error in failures:
            self._put(request_id, error)

    def _put(self, request_id: str, item: _Item) -> None:
        reader = self._readers.get(request_id)
        if reader is None:  # it has left
            return
        reader.waiting.append(item)
        now = self._asyncio.time()
        if now >= reader.due or _is_last(item):
            reader.woken.put_nowait(reader.waiting)
            reader.waiting = []
            reader.due = now + self._streams / self._events_per_s

    def _fail_all(self) -> None:
        for request_id in self._readers:
            self._put(request_id, self._unavailable())

    def _unavailable(self) -> Unavailable:
        state = f"has failed ({self.failure})" if self.failure else "is closed"
        return Unavailable(f"the generation engine {state}; try again")


async def _next(
    woken: asyncio.Queue[list[_Item]],
) -> tuple[list[TokenEvent], Blip2ServeError | None]:
    """Waits for items; returns all that are ready and, if the last is an error, that error."""
    items: list[_Item] = []
    while not items or not (woken.empty() or _is_last(items[-1])):
        items += await woken.get()
    events = [item for item in items if isinstance(item, TokenEvent)]
    errors = [item for item in items if isinstance(item, Blip2ServeError)]
    return events, errors[0] if errors else None


def _is_last(item: _Item) -> bool:
    return not isinstance(item, TokenEvent) or item.last


def _merged(events: list[TokenEvent]) -> Iterable[TokenEvent]:
    """Merges the events of each answer into one; the request's last event stays last."""
    merged: dict[int, TokenEvent] = {}
    for event in events:
        earlier = merged.pop(event.index, None)
        merged[event.index] = event if earlier is None else earlier + event
    return merged.values()
