"""Users who ask again as soon as they are answered, and check every answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp

from loadtest.answers import DONE, WrongAnswer, cut, event, piece
from loadtest.bench.servers import Endpoint
from loadtest.bench.workload import Request

TIMEOUT_S = 600
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Answer:
    """One answered request, with its times in seconds of `time.perf_counter`."""

    started: float
    ended: float
    tokens: int
    texts: tuple[float, ...] = ()  # the arrival of each chunk with text, if streamed
    text: str = ""


@dataclass(frozen=True)
class Window:
    """All answers around a span of time in which every user was busy."""

    opened: float
    closed: float
    answers: list[Answer]

    def per_second(self) -> tuple[float, float]:
        """Requests and tokens per second.

        An answer counts by the share of its time inside the window: one that took 4 seconds, the
        last of them inside, is a quarter of a request. Counting whole answers by their end would be
        off by up to a batch, which can be a fifth of all answers to 32 users.
        """
        shares = [(self._share(answer), answer.tokens) for answer in self.answers]
        seconds = self.closed - self.opened
        requests = sum(share for share, _ in shares)
        tokens = sum(share * tokens for share, tokens in shares)
        return requests / seconds, tokens / seconds

    def ended_inside(self) -> list[Answer]:
        """The answers whose latencies count."""
        return [a for a in self.answers if self.opened < a.ended <= self.closed]

    def _share(self, answer: Answer) -> float:
        inside = min(answer.ended, self.closed) - max(answer.started, self.opened)
        return max(inside, 0.0) / (answer.ended - answer.started)


async def measure(
    endpoint: Endpoint, requests: Iterator[Request], *, users: int, seconds: float, stream: bool
) -> Window:
    """Opens a window of `seconds` once each user has had an answer.

    The users keep asking until all requests in flight at its end are answered, so the last requests
    of the window meet the same load as the first.

    Raises:
        WrongAnswer: the first one ends the measurement.
    """
    answers: list[Answer] = []
    started = [0.0] * users  # of each user's latest request
    answered: set[int] = set()
    opened = closed = float("inf")

    async def user(number: int) -> None:
        nonlocal opened, closed
        while True:
            started[number] = time.perf_counter()
            if min(started) >= closed:
                return
            answers.append(await ask(session, endpoint, next(requests), stream=stream))
            answered.add(number)
            if len(answered) == users and opened == float("inf"):
                opened = time.perf_counter()
                closed = opened + seconds

    async with new_session() as session:
        await together(map(user, range(users)))
    return Window(opened, closed, answers)


def new_session() -> aiohttp.ClientSession:
    """A session for any number of users; needs an event loop."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_S), connector=aiohttp.TCPConnector(limit=0)
    )


async def together(users: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Runs all coroutines; the first error cancels the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for user in users:
                group.create_task(user)
    except ExceptionGroup as group:
        raise group.exceptions[0] from None


async def ask(
    session: aiohttp.ClientSession,
    endpoint: Endpoint,
    request: Request,
    *,
    stream: bool,
    silent: bool = False,
) -> Answer:
    """Sends one request and checks its answer. `silent` accepts an answer without text.

    Raises:
        WrongAnswer: an error, no text, or another number of tokens than requested.
    """
    body = json.dumps(request.body(endpoint.model, stream=stream)).encode()
    return await send(session, endpoint, body, request.tokens, stream=stream, silent=silent)


async def send(
    session: aiohttp.ClientSession,
    endpoint: Endpoint,
    body: bytes,
    expected_tokens: int,
    *,
    stream: bool,
    silent: bool = False,
) -> Answer:
    """As `ask`, for a body that is encoded already."""
    texts: list[float] = []
    text = ""
    answer: Any = None  # the body, or a stream's last chunk: both hold the usage
    url = f"{endpoint.url}/chat/completions"
    started = time.perf_counter()
    try:
        async with session.post(url, data=body, headers=JSON) as response:
            if response.status != 200:
                raise WrongAnswer(f"status {response.status}: {cut(await response.text())}")
            if stream:
                async for answer in events(response.content):
                    if new := piece(answer, "delta"):
                        texts.append(time.perf_counter())
                        text += new
            else:
                answer = await response.json()
                text = piece(answer, "message")
        ended = time.perf_counter()
        tokens = answer["usage"]["completion_tokens"]
    except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError) as error:
        raise WrongAnswer(f"{error!r} after {cut(answer)}") from error
    if tokens != expected_tokens:
        raise WrongAnswer(f"{tokens} tokens instead of {expected_tokens}: {cut(answer)}")
    if not (text or silent):
        raise WrongAnswer(f"no text in {tokens} tokens: {cut(answer)}")
    return Answer(started, ended, tokens, tuple(texts), text)


async def events(lines: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    """The JSON of each server-sent event up to [DONE].

    Raises:
        WrongAnswer: an error, or a stream that ends without [DONE].
    """
    async for line in lines:
        found = event(line)
        if found is DONE:
            return
        if found is not None:
            yield found
    raise WrongAnswer("the stream ended without [DONE]")
