"""For `gpu_app.py`: processes whose users ask in closed loops and do nothing else meanwhile.

Users are split among the processes. Bodies are encoded in advance, and each sends a picture that
the server has not seen: one of the stock, with other bytes behind the end of the JPEG, which change
its digest but not its pixels. So no cache of the server has it, and a small stock is enough.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection, wait
from typing import Any

from loadtest.answers import WrongAnswer
from loadtest.bench.client import Answer, Window, new_session, send
from loadtest.bench.servers import Endpoint
from loadtest.bench.workload import Request, data_url

RETRY_S = 0.1  # after a failure
SETTLED_S = 60  # within which each user must have had an answer or a failure
LAST_ANSWERS_S = 20  # for those under way when the window has closed; later ones are failures
REASON_CHARACTERS = 150

NEVER = float("inf")


@dataclass(frozen=True)
class Drive:
    """An order to a process: let users ask until the window closes."""

    users: int
    stream: bool


@dataclass(frozen=True)
class Span:
    """When the window opens and closes, in seconds of `time.perf_counter`: one clock for all."""

    opened: float
    closed: float


class ClientsFailed(Exception):
    """A client process has ended, or was silent for too long."""


@dataclass
class Outcome:
    """What the users of one process, or of all, have seen."""

    answers: list[Answer] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)  # by reason
    cpu_s: float = 0.0  # of the processes, while the window was open

    def window(self, span: Span) -> Window:
        return Window(span.opened, span.closed, self.answers)


class Bodies:
    """Request bodies for captions of `tokens` tokens, each with a picture of its own.

    `name` (4 bytes) tells the pictures of several of these apart.
    """

    def __init__(self, model: str, pictures: Sequence[bytes], tokens: int, name: bytes) -> None:
        self.tokens = tokens
        self._name = name
        whole = (jpeg + bytes(-len(jpeg) % 3) for jpeg in pictures)
        self._urls = [data_url(jpeg).encode() for jpeg in whole]
        self._around = {stream: _around(model, tokens, stream) for stream in (False, True)}
        self._numbers = count()

    def next(self, *, stream: bool) -> bytes:
        number = next(self._numbers)
        head, tail = self._around[stream]
        unique = base64.b64encode(self._name + number.to_bytes(8, "big"))
        return b"".join((head, self._urls[number % len(self._urls)], unique, tail))


def _around(model: str, tokens: int, stream: bool) -> tuple[bytes, bytes]:
    """What comes before and after the picture in a body."""
    body = json.dumps(Request("", "the picture", tokens).body(model, stream=stream))
    head, tail = body.encode().split(b"the picture")
    return head, tail


# -- in a client process ---------------------------------------------------------------------------


def serve(connection: Connection, endpoint: Endpoint, bodies: Bodies) -> None:
    """Follows orders until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent ends this process
    with contextlib.suppress(EOFError, BrokenPipeError):
        asyncio.run(_serve(connection, endpoint, bodies))


async def _serve(connection: Connection, endpoint: Endpoint, bodies: Bodies) -> None:
    async with new_session() as session:

        async def ask(stream: bool) -> Answer:
            body = bodies.next(stream=stream)
            return await send(session, endpoint, body, bodies.tokens, stream=stream)

        while True:
            order: Drive = await _next(connection)
            connection.send(await _Users(connection, order, ask).drive())


class _Users:
    """The users of one order, from their first requests to their last answers."""

    def __init__(
        self, connection: Connection, order: Drive, ask: Callable[[bool], Awaitable[Answer]]
    ) -> None:
        self._connection, self._order, self._ask = connection, order, ask
        self._span = Span(NEVER, NEVER)
        self._started = [0.0] * order.users  # of each user's latest request
        self._settled: set[int] = set()  # users that had an answer or a failure
        self._outcome = Outcome()
        self._told_again = False

    async def drive(self) -> Outcome:
        async with asyncio.TaskGroup() as group:
            users = [group.create_task(self._user(n)) for n in range(self._order.users)]
            await self._follow_span()
            _, late = await asyncio.wait(users, timeout=LAST_ANSWERS_S)
            for user in late:
                user.cancel()
                self._outcome.failures["no answer"] += 1
        return self._outcome

    async def _follow_span(self) -> None:
        """Returns when the window has closed. The parent may open it before it knows its end."""
        used = None
        while self._span.closed == NEVER:
            self._span = await _next(self._connection)
            await _sleep_until(self._span.opened)
            used = time.process_time() if used is None else used
        await _sleep_until(self._span.closed)
        self._outcome.cpu_s = time.process_time() - (used or 0.0)

    async def _user(self, number: int) -> None:
        while True:
            self._started[number] = time.perf_counter()
            if min(self._started) >= self._span.closed:
                return
            try:
                answer = await self._ask(self._order.stream)
            except WrongAnswer as error:
                self._outcome.failures[str(error)[:REASON_CHARACTERS]] += 1
                self._tell_settled(number)
                await asyncio.sleep(RETRY_S)
            else:
                self._outcome.answers.append(answer)
                self._tell_settled(number)
                self._tell_again(answer)

    def _tell_settled(self, number: int) -> None:
        if len(self._settled) < self._order.users:
            self._settled.add(number)
            if len(self._settled) == self._order.users:
                self._connection.send("settled")

    def _tell_again(self, answer: Answer) -> None:
        """Tells of the first answer to a request that was sent after the window had opened."""
        if not self._told_again and answer.started > self._span.opened:
            self._told_again = True
            self._connection.send("answered")


async def _next(connection: Connection) -> Any:
    """The next message from the parent; EOFError if it has ended."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(connection.fileno(), ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(connection.fileno())
    return connection.recv()


async def _sleep_until(moment: float) -> None:
    await asyncio.sleep(max(0.0, moment - time.perf_counter()))


# -- in the parent ---------------------------------------------------------------------------------


class Clients:
    """All client processes. While entered they run; they keep their connections to the server.

    They share out the pictures, of which there must be at least one for each.
    """

    def __init__(
        self, endpoint: Endpoint, pictures: Sequence[bytes], tokens: int, processes: int
    ) -> None:
        context = multiprocessing.get_context("spawn")
        assert len(pictures) >= processes
        self._connections: list[Connection] = []
        self._theirs: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        for number in range(processes):
            own, theirs = context.Pipe()
            bodies = Bodies(endpoint.model, pictures[number::processes], tokens, b"%04d" % number)
            there = Endpoint(endpoint.url, endpoint.model)
            process = context.Process(target=serve, args=(theirs, there, bodies), daemon=True)
            self._connections.append(own)
            self._theirs.append(theirs)
            self._processes.append(process)

    def __enter__(self) -> Clients:
        for process, theirs in zip(self._processes, self._theirs, strict=True):
            process.start()
            theirs.close()  # now a process that ends closes it
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def start(self, users: int, *, stream: bool) -> None:
        """Lets so many users ask; returns when each had an answer or a failure."""
        each, more = divmod(users, len(self._connections))
        shares = [each + (n < more) for n in range(len(self._connections))]
        self._busy = [c for c, n in zip(self._connections, shares, strict=True) if n]
        for connection, share in zip(self._busy, filter(None, shares), strict=True):
            connection.send(Drive(share, stream))
        for connection in self._busy:
            _receive(connection, "settled", SETTLED_S)

    def tell(self, span: Span) -> None:
        """Tells when the window opens and closes; to be told again if it had no end yet."""
        for connection in self._busy:
            connection.send(span)

    def wait_for_answer(self, within_s: float) -> None:
        """Returns after the first answer to a request that was sent in the window.

        Raises:
            ClientsFailed: there was none.
        """
        deadline = time.monotonic() + within_s
        while ready := wait(self._busy, max(0.0, deadline - time.monotonic())):
            for connection in self._busy:
                if connection in ready and _read(connection) == "answered":
                    return
        raise ClientsFailed(f"no answer within {within_s} s")

    def finish(self, span: Span) -> Outcome:
        """Waits for the end of the window and for the last answers."""
        within_s = span.closed - time.perf_counter() + 2 * LAST_ANSWERS_S
        outcomes = [_receive(connection, Outcome, within_s) for connection in self._busy]
        return Outcome(
            [answer for outcome in outcomes for answer in outcome.answers],
            sum((outcome.failures for outcome in outcomes), Counter()),
            sum(outcome.cpu_s for outcome in outcomes),
        )


def _receive(connection: Connection, wanted: str | type[Outcome], within_s: float) -> Any:
    """The next message of this kind; drops others."""
    deadline = time.monotonic() + within_s
    while connection.poll(max(0.0, deadline - time.monotonic())):
        message = _read(connection)
        if message == wanted or (isinstance(wanted, type) and isinstance(message, wanted)):
            return message
    raise ClientsFailed(f"a client process was silent for {within_s:.0f} s")


def _read(connection: Connection) -> Any:
    try:
        return connection.recv()
    except EOFError:
        raise ClientsFailed("a client process has ended") from None
