"""Raw HTTP/1.1 over kept connections.

A request costs some 0.3 ms of CPU time, so this process can share two cores with the server
that it loads.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

KEEP_IDLE_S = 2.0  # shorter than any server's own limit, which would close under a request


class NoAnswer(Exception):
    """The message is the kind: "timeout", "connection refused", "connection reset", ..."""


@dataclass(frozen=True)
class Reply:
    """A whole response; names of headers are in lower case."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes


class Connections:
    """As many connections to one server as there are requests in flight; needs an event loop."""

    def __init__(self, url: str, timeout_s: float) -> None:
        """`timeout_s` limits each request, its connection included."""
        parts = urlsplit(url)
        self._address = parts.hostname or "127.0.0.1", parts.port or 80
        self._timeout_s = timeout_s
        self._idle: list[tuple[float, _Connection]] = []  # since when; the latest is last

    async def send(self, request: bytes) -> Reply:
        """Sends the bytes of a request.

        Raises:
            NoAnswer: no complete response came.
        """
        connection: _Connection | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = self._take() or await self._connect()
                reply = await connection.exchange(request)
        except TimeoutError:
            raise NoAnswer("timeout") from None
        except OSError as error:
            refused = isinstance(error, ConnectionRefusedError)
            raise NoAnswer("connection refused" if refused else type(error).__name__) from None
        else:
            self._idle.append((time.perf_counter(), connection))
            connection = None
            return reply
        finally:  # also if this task is cancelled
            if connection is not None:
                connection.abort()

    def close(self) -> None:
        while self._idle:
            self._idle.pop()[1].abort()

    def _take(self) -> _Connection | None:
        """The connection used last, so that those not needed grow old and are closed."""
        now = time.perf_counter()
        while self._idle and now - self._idle[0][0] > KEEP_IDLE_S:
            self._idle.pop(0)[1].abort()
        while self._idle:
            _, connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, *self._address)
        return connection


class _Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._reply: asyncio.Future[Reply] | None = None
        self.is_open = True

    async def exchange(self, request: bytes) -> Reply:
        self._received.clear()
        self._reply = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._reply
        finally:
            self._reply = None

    def abort(self) -> None:
        self.is_open = False
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        reply = parse(self._received, ended=False)
        if reply is not None and self._reply is not None and not self._reply.done():
            if reply.headers.get(b"connection", b"").lower() == b"close":
                self.is_open = False
            self._reply.set_result(reply)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if self._reply is None or self._reply.done():
            return
        reply = parse(self._received, ended=True)
        if reply is not None:
            self._reply.set_result(reply)
        elif self._received:
            self._reply.set_exception(NoAnswer("cut answer"))
        else:
            kind = "connection reset" if error else "closed without an answer"
            self._reply.set_exception(NoAnswer(kind))


def parse(data: bytes | bytearray, *, ended: bool) -> Reply | None:
    """The response in `data`, or None while it is incomplete. `ended`: nothing more will come."""
    head, blank, body = bytes(data).partition(b"\r\n\r\n")
    if not blank:
        return None
    first, *lines = head.split(b"\r\n")
    pairs = (line.partition(b":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    whole: bytes | None
    if b"content-length" in headers:
        length = int(headers[b"content-length"])
        whole = body[:length] if len(body) >= length else None
    elif headers.get(b"transfer-encoding", b"").lower() == b"chunked":
        whole = _joined(body)
    else:
        whole = body if ended else None
    return None if whole is None else Reply(int(first.split()[1]), headers, whole)


def _joined(chunked: bytes) -> bytes | None:
    """The body without the sizes of its chunks; None while the last chunk is missing."""
    whole, rest = b"", chunked
    while True:
        size, line_end, rest = rest.partition(b"\r\n")
        if not line_end:
            return None
        length = int(size.partition(b";")[0], 16)
        if len(rest) < length + 2:
            return None
        if length == 0:
            return whole
        whole, rest = whole + rest[:length], rest[length + 2 :]
