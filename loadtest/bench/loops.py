"""Open and closed loops of captions, for a server that refuses some of them."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import math
import os
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from loadtest.answers import REFUSALS
from loadtest.bench.connections import Connections, NoAnswer, Reply
from loadtest.bench.servers import Endpoint
from loadtest.bench.workload import Request, data_url, picture

TOKENS = 16  # of every caption
PICTURES, SIZE = 32, (224, 168)
MARK_BYTES = 12  # a multiple of three, which are four characters of base64
PAUSE_S = 1.0  # of a refused client that is not told when to come back
PROBE_EVERY_S = 0.2


@dataclass(frozen=True)
class Outcome:
    """What became of one try of a request, with times in seconds of `time.perf_counter`."""

    request: int
    tries: int  # 1 is the first
    due: float  # when it should have been sent
    sent: float
    ended: float
    status: int = 0  # 0: no answer
    failure: str = ""  # its kind; empty if answered rightly, or refused
    retry_after_s: float | None = None

    @property
    def is_answered(self) -> bool:
        return self.status == 200 and not self.failure

    @property
    def is_refused(self) -> bool:
        return self.status in REFUSALS

    @property
    def latency_s(self) -> float:
        return self.ended - self.due


class Messages:
    """Requests for captions as bytes, each about a picture that no server has seen.

    A few small JPEGs are drawn in advance. Each request has one of them with other bytes after its
    end, which decoders ignore: another file to every cache, for the price of joining three pieces.
    """

    def __init__(self, endpoint: Endpoint, seed: int, key: str | None = None) -> None:
        """`key`: an API key."""
        self._pieces = [
            _pieces(endpoint, _small(np.random.default_rng((seed, number))), key)
            for number in range(PICTURES)
        ]
        self._run = os.urandom(MARK_BYTES - 8)  # another run sends other pictures

    def message(self, number: int) -> bytes:
        before, after = self._pieces[number % PICTURES]
        return before + base64.b64encode(self._run + number.to_bytes(8)) + after


def _small(rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(picture(rng))).resize(SIZE).save(file, "JPEG", quality=85)
    jpeg = file.getvalue()
    return jpeg + bytes(-len(jpeg) % 3)


def _pieces(endpoint: Endpoint, jpeg: bytes, key: str | None) -> tuple[bytes, bytes]:
    """What comes before and after the mark of a request about this picture."""
    mark = "*" * len(base64.b64encode(bytes(MARK_BYTES)))
    request = Request("", data_url(jpeg) + mark, TOKENS)
    body = json.dumps(request.body(endpoint.model, stream=False))
    parts = urlsplit(endpoint.url)
    head = (
        f"POST {parts.path}/chat/completions HTTP/1.1",
        f"host: {parts.netloc}",
        "content-type: application/json",
        *([f"authorization: Bearer {key}"] if key else []),
        f"content-length: {len(body)}",
        "",
        body,
    )
    before, after = "\r\n".join(head).split(mark)
    return before.encode(), after.encode()


class Clients:
    """Sends messages and says what became of them."""

    def __init__(self, messages: Messages, connections: Connections) -> None:
        self._messages = messages
        self._connections = connections
        self._numbers = itertools.count()

    def new(self) -> int:
        """The number of a request that has not been sent yet."""
        return next(self._numbers)

    async def ask(self, number: int, due: float | None = None, tries: int = 1) -> Outcome:
        """Sends a request; without `due`, its time is now."""
        sent = time.perf_counter()
        due = sent if due is None else due
        try:
            reply = await self._connections.send(self._messages.message(number))
        except NoAnswer as error:
            return Outcome(number, tries, due, sent, time.perf_counter(), failure=str(error))
        ended = time.perf_counter()
        failure, wait_s = _failure(reply), _retry_after(reply)
        return Outcome(number, tries, due, sent, ended, reply.status, failure, wait_s)


def _failure(reply: Reply) -> str:
    if reply.status in REFUSALS:
        return ""
    if reply.status != 200:
        return f"status {reply.status}"
    try:
        tokens = json.loads(reply.body)["usage"]["completion_tokens"]
    except (ValueError, LookupError, TypeError):
        return "wrong answer"
    return "" if tokens == TOKENS else "wrong answer"


def _retry_after(reply: Reply) -> float | None:
    """Seconds; None without a header that says so."""
    try:
        seconds = float(reply.headers.get(b"retry-after", b""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None


# -- loops -----------------------------------------------------------------------------------------


def poisson(rate: float, seconds: float, rng: random.Random) -> Iterator[float]:
    """Times of arrivals, in seconds since the start."""
    at = rng.expovariate(rate)
    while at < seconds:
        yield at
        at += rng.expovariate(rate)


async def open_loop(
    clients: Clients, arrivals: Iterable[float], seconds: float
) -> tuple[float, list[asyncio.Task[Outcome]]]:
    """Sends one request at each time, whatever becomes of the others, for `seconds`.

    Returns when it began, and all requests. Some may not be answered yet.
    """
    began = time.perf_counter()
    asked = []
    for at in arrivals:
        due = began + at
        await asyncio.sleep(due - time.perf_counter())  # never skipped: others need their turn
        asked.append(asyncio.create_task(clients.ask(clients.new(), due)))
    await asyncio.sleep(began + seconds - time.perf_counter())
    return began, asked


async def closed_loop(
    clients: Clients, users: int, lead_s: float, seconds: float
) -> tuple[float, list[Outcome]]:
    """Users who ask again as soon as they are answered, and come back when a refusal says so.

    The window opens after `lead_s`. The users go on until all requests in flight at its end are
    answered, so the last ones meet the same load as the first.

    Returns when the window opened, and what became of all requests.
    """
    opened = time.perf_counter() + lead_s
    asked_at = [0.0] * users  # inf while a user waits after a refusal
    outcomes: list[Outcome] = []

    async def user(number: int) -> None:
        request, tries = clients.new(), 1
        while True:
            asked_at[number] = time.perf_counter()
            if min(asked_at) >= opened + seconds:
                return
            outcome = await clients.ask(request, tries=tries)
            outcomes.append(outcome)
            if outcome.is_answered:
                request, tries = clients.new(), 1
                continue
            asked_at[number] = math.inf
            wait_s = PAUSE_S if outcome.retry_after_s is None else outcome.retry_after_s
            if time.perf_counter() + wait_s >= opened + seconds:
                return
            await asyncio.sleep(wait_s)
            tries += 1

    async with asyncio.TaskGroup() as group:
        for number in range(users):
            group.create_task(user(number))
    return opened, outcomes


async def recovery(clients: Clients, fast_s: float, within_s: float) -> float | None:
    """Probes until a request is answered within `fast_s`.

    Returns the seconds until that answer; None if there was none in `within_s`.
    """
    began = time.perf_counter()
    probes: set[asyncio.Task[Outcome]] = set()
    try:
        while time.perf_counter() < began + within_s:
            probes.add(asyncio.create_task(clients.ask(clients.new())))
            await asyncio.sleep(PROBE_EVERY_S)
            done = {probe for probe in probes if probe.done()}
            probes -= done
            found = [probe.result() for probe in done]
            if fast := [o.ended for o in found if o.is_answered and o.latency_s <= fast_s]:
                return min(fast) - began
        return None
    finally:
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)
