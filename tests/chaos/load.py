"""Clients that send every kind of request at a steady rate, and record what comes.

A template is a request whose undisturbed answer is known. Each time it is sent with the same
picture in another file, so the server has to compute the features again.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from blip2_serve.demo import scenes
from blip2_serve.http.deadline import HEADER
from support.images import data_url, encode
from tests.chaos import history
from tests.chaos.history import DONE, Choice, Ended, Event, Headers, How, Sent, now

TIMEOUT_S = 120.0
CHAT, GENERATE, CAPTION = "/v1/chat/completions", "/v1/generate", "/v1/caption"
LONG = {"ignore_eos": True, "max_tokens": 60}
FIRST_SCENE = 6_000

# Kind, path, and fields. `stream` is a kind of its own.
KINDS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("caption", CAPTION, {}),
    ("caption, beams", CAPTION, {"num_beams": 3}),
    ("chat", CHAT, {}),
    ("chat, logprobs", CHAT, {"logprobs": True}),
    ("chat, stream", CHAT, {**LONG, "stream": True}),
    ("chat, sampled, stream", CHAT, {**LONG, "temperature": 1, "stream": True}),
    ("chat, n, sampled, stream", CHAT, {**LONG, "temperature": 1, "n": 3, "stream": True}),
    ("chat, logprobs, stream", CHAT, {**LONG, "logprobs": True, "stream": True}),
    ("generate", GENERATE, {"prompt": "a", **LONG}),
    ("generate, sampled", GENERATE, {"temperature": 1, **LONG}),
    ("generate, sampled, stream", GENERATE, {"temperature": 1, **LONG, "stream": True}),
    ("generate, beams", GENERATE, {"num_beams": 3, "n": 2}),
    ("generate, beams, stream", GENERATE, {"num_beams": 3, "n": 2, "stream": True}),
)


@dataclass(frozen=True)
class Template:
    kind: str
    path: str
    body: dict[str, Any]  # without the picture
    picture: bytes

    def with_picture(self, picture: bytes) -> dict[str, Any]:
        url = data_url(picture)
        if self.path != CHAT:
            return {**self.body, "image": url}
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "what is it?"},
        ]
        return {**self.body, "messages": [{"role": "user", "content": parts}]}


def templates(each: int, seed: int) -> list[Template]:
    """This many of every kind, each about another picture."""
    rng = random.Random(seed)
    numbers = itertools.count(FIRST_SCENE)
    return [
        Template(
            kind,
            path,
            {**fields, "return_token_ids": True, "seed": rng.getrandbits(31)},
            encode(scenes.sample(next(numbers)).image),
        )
        for kind, path, fields in KINDS
        for _ in range(each)
    ]


async def undisturbed(
    session: aiohttp.ClientSession, url: str, some: Sequence[Template]
) -> list[tuple[Choice, ...]]:
    """The answers of a server at rest, one after the other and not streamed."""
    answers = []
    for template in some:
        body = {**template.with_picture(template.picture), "stream": False}
        async with session.post(url + template.path, json=body) as response:
            response.raise_for_status()
            answers.append(history.answer([await response.json()]))
    return answers


def new_session() -> aiohttp.ClientSession:
    """A session for any number of requests at once."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    return aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))


class Load:
    """Sends requests at `rate` per second, and records them in `writer`.

    More are sent while fewer than `at_least` are in flight, and none while `at_most` are.
    """

    def __init__(
        self,
        url: str,
        some: Sequence[tuple[Template, tuple[Choice, ...]]],
        writer: history.Writer,
        rate: float,
        seed: int,
        at_most: int | None = None,
        at_least: int = 0,
    ) -> None:
        self._url, self._templates, self._writer, self._rate = url, some, writer, rate
        self._at_most, self._at_least = at_most, at_least
        self._rng = random.Random(seed)
        self._run = self._rng.getrandbits(32)
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def in_flight(self) -> int:
        return len(self._tasks)

    @asynccontextmanager
    async def running(self, session: aiohttp.ClientSession) -> AsyncIterator[None]:
        """Sends during the block; leaves it once all requests are answered."""
        enough = asyncio.Event()
        sending = asyncio.create_task(self.run(session, enough))
        try:
            yield
        finally:
            enough.set()
            await sending

    async def run(self, session: aiohttp.ClientSession, until: asyncio.Event) -> None:
        """Sends until the event is set; returns once all are answered."""
        while not until.is_set():
            while self._at_most and len(self._tasks) >= self._at_most:
                await asyncio.wait(self._tasks, return_when=FIRST_COMPLETED)
            self.send(session)
            await self._until_due(self._rng.expovariate(self._rate))
        await asyncio.gather(*self._tasks)

    async def _until_due(self, seconds: float) -> None:
        """Waits so long, or until too few requests are in flight."""
        due = now() + seconds
        while len(self._tasks) >= self._at_least and (left := due - now()) > 0:
            if self._at_least:
                await asyncio.wait(self._tasks, timeout=left, return_when=FIRST_COMPLETED)
            else:
                await asyncio.sleep(left)

    def send(self, session: aiohttp.ClientSession) -> None:
        """Sends one request now."""
        template, expected = self._rng.choice(self._templates)
        picture = template.picture + self._rng.randbytes(16)  # decoders ignore the rest
        name = f"chaos-{self._run:08x}-{next(self._numbers)}"
        task = asyncio.create_task(self._ask(session, name, template, picture, expected))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(
        self,
        session: aiohttp.ClientSession,
        name: str,
        template: Template,
        picture: bytes,
        expected: tuple[Choice, ...],
    ) -> None:
        stream = bool(template.body.get("stream"))
        sent = Sent(name, template.kind, template.path, template.body, stream, expected, now())
        self._writer.add(sent)
        how: How = "no answer"
        detail = ""
        try:
            headers = {"x-request-id": name}
            if sent.deadline_s is not None:
                headers[HEADER] = str(sent.deadline_s)
            body = template.with_picture(picture)
            async with session.post(
                self._url + template.path, json=body, headers=headers
            ) as response:
                got = {key.lower(): value for key, value in response.headers.items()}
                self._writer.add(Headers(name, response.status, got, now()))
                how = "cut"
                how = await self._receive(name, response)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            detail = repr(error)
        self._writer.add(Ended(name, how, now(), detail))

    async def _receive(self, name: str, response: aiohttp.ClientResponse) -> How:
        if response.content_type != "text/event-stream":
            text = await response.text()
            try:
                data = json.loads(text)
            except ValueError:  # such as a proxy's own error page
                data = {"error": {"message": text}}
            self._writer.add(Event(name, data, now()))
            return "done"
        how: How = "closed"
        async for data in _events(response.content):
            self._writer.add(Event(name, data, now()))
            how = "done" if data == DONE else how
        return how


async def _events(lines: AsyncIterable[bytes]) -> AsyncIterator[Any]:
    async for line in lines:
        name, _, data = line.strip().partition(b": ")
        if name == b"data":
            yield DONE if data == DONE.encode() else json.loads(data)
