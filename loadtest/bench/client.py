"""Users who send their next request as soon as the last is answered, and check every answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp

from bench.servers import Endpoint
from bench.workload import Request

TIMEOUT_S = 600
SHOWN_OF_A_WRONG_ANSWER = 500  # characters


class WrongAnswer(Exception):
    """A server did not answer what was asked; nothing measured on it counts."""


@dataclass(frozen=True)
class Answer:
    """When one request was under way, in seconds of `time.perf_counter`."""

    started: float
    ended: float
    tokens: int
    texts: tuple[float, ...] = ()  # when each chunk with text came; only of a stream
    text: str = ""


@dataclass(frozen=True)
class Window:
    """All answers around a span of time in which all users were busy."""

    opened: float
    closed: float
    answers: list[Answer]

    def per_second(self) -> tuple[float, float]:
        """Requests and tokens per second.

        An answer counts by the share of its time that lies in the window: one that took 4 seconds,
        the last one of them in the window, is a quarter of a request. Counting whole answers by
        their end would be off by up to a batch, which at 32 users can be a fifth of all.
        """
        shares = [(self._share(answer), answer.tokens) for answer in self.answers]
        seconds = self.closed - self.opened
        requests = sum(share for share, _ in shares)
        tokens = sum(share * tokens for share, tokens in shares)
        return requests / seconds, tokens / seconds

    def ended_inside(self) -> list[Answer]:
        """The answers that latencies are taken from."""
        return [a for a in self.answers if self.opened < a.ended <= self.closed]

    def _share(self, answer: Answer) -> float:
        inside = min(answer.ended, self.closed) - max(answer.started, self.opened)
        return max(inside, 0.0) / (answer.ended - answer.started)


async def measure(
    endpoint: Endpoint, requests: Iterator[Request], *, users: int, seconds: float, stream: bool
) -> Window:
    """Keeps so many users busy. The window opens when each of them has had an answer.

    It stays open for `seconds`. The users go on until all that was under way at its end is
    answered, so that the last requests of the window meet the same load as the first.

    Raises:
        WrongAnswer: the first one.
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
    """For any number of users; needs an event loop."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_S), connector=aiohttp.TCPConnector(limit=0)
    )


async def together(users: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Runs all of them; the first error ends them all."""
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
    """Sends one request, and checks its answer. `silent`: one without text will do.

    Raises:
        WrongAnswer: an error, no text, or not exactly the number of tokens asked for.
    """
    texts: list[float] = []
    text = ""
    answer: Any = None  # the body, or the last chunk of a stream: both have the usage
    body = request.body(endpoint.model, stream=stream)
    started = time.perf_counter()
    try:
        async with session.post(f"{endpoint.url}/chat/completions", json=body) as response:
            if response.status != 200:
                raise WrongAnswer(f"status {response.status}: {_cut(await response.text())}")
            if stream:
                async for answer in events(response.content):
                    if piece := _text(answer, "delta"):
                        texts.append(time.perf_counter())
                        text += piece
            else:
                answer = await response.json()
                text = _text(answer, "message")
        ended = time.perf_counter()
        tokens = answer["usage"]["completion_tokens"]
    except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError) as error:
        raise WrongAnswer(f"{error!r} after {_cut(answer)}") from error
    if tokens != request.tokens:
        raise WrongAnswer(f"{tokens} tokens, not {request.tokens}: {_cut(answer)}")
    if not (text or silent):
        raise WrongAnswer(f"no text in {tokens} tokens: {_cut(answer)}")
    return Answer(started, ended, tokens, tuple(texts), text)


async def events(lines: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    """The JSON of each server-sent event, up to [DONE].

    Raises:
        WrongAnswer: the stream ended without [DONE].
    """
    async for line in lines:
        field, _, data = line.partition(b":")
        if field != b"data":
            continue  # an empty line ends an event, a line that starts with a colon is a comment
        if data.strip() == b"[DONE]":
            return
        yield json.loads(data)
    raise WrongAnswer("a stream ended without [DONE]")


def _text(answer: Any, part: str) -> str:
    """The text of a body's "message" or of a chunk's "delta"."""
    return "".join(choice.get(part, {}).get("content") or "" for choice in answer["choices"])


def _cut(answer: Any) -> str:
    return str(answer)[:SHOWN_OF_A_WRONG_ANSWER]
