"""A fake backend behind the real routes, and helpers for requests and responses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from fastapi import FastAPI

from blip2_serve.config import AppConfig
from blip2_serve.errors import Unavailable
from blip2_serve.http.api import create_app
from blip2_serve.http.refusals import Capacity
from blip2_serve.types import (
    Beam,
    Choice,
    Completion,
    FinishReason,
    ImageFeatures,
    SamplingParams,
    StageStatus,
    TokenEvent,
    TokenLogprob,
)
from support.images import data_url
from support.recorder import FakeRecorder

PROMPT_TOKENS = 9
PIECES = ("\n", " a", " small ", "", " red", " circle", " \n")
TEXT = "".join(PIECES)
BEAMS = (Beam("a cat", -0.5, False), Beam("a cow", -0.75, True))
TOKEN_IDS = tuple(range(10, 10 + len(PIECES)))
ROUTES = ("/v1/chat/completions", "/v1/generate", "/v1/caption", "/v1/completions")


@dataclass
class FakeBackend:
    """Answers every image with its content and TEXT; raises `failures` for the images in it.

    The second of n answers ends with " 1", the third with " 2", and so on.
    """

    is_ready: bool = True
    failures: dict[bytes, Exception] = field(default_factory=dict)
    generation_failure: Exception | None = None
    stream_fails_after: int | None = None  # tokens; None: never
    stream_failure: Exception = field(default_factory=lambda: Unavailable("a replica was lost"))
    endless: bool = False
    finish_reason: FinishReason = "stop"
    encoded: list[bytes] = field(default_factory=list)
    owners: list[str] = field(default_factory=list)  # of what was encoded
    prompts: list[str] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)
    stream_closed: asyncio.Event = field(default_factory=asyncio.Event)
    metrics_pages: dict[str, str] = field(default_factory=dict)
    held: dict[bytes, asyncio.Event] = field(default_factory=dict)  # encoding waits for the event
    abandoned: list[bytes] = field(default_factory=list)  # held images whose wait was cancelled
    can_do: Capacity = field(default_factory=lambda: Capacity(100.0, 100.0))
    refusals: int = 0
    known: set[bytes] = field(default_factory=set)  # images whose features are held
    encode_s: float = 0.0  # as told
    queue_s: float = 0.0
    loses_replica_after: int | None = None  # tokens
    together: asyncio.Barrier | None = None  # makes calls of `features` wait for each other

    async def unready(self) -> str | None:
        return None if self.is_ready else "the stages are warming up"

    async def status(self) -> list[StageStatus]:
        return [
            StageStatus("ingress", 1, 0, 0),
            StageStatus("preprocessor", 2, 1, 0, 3, 12.5, 20.5),
            StageStatus("encoder", 1, 0, 1, 0, 0.0, None),
            StageStatus("generator", 0, 1, 0),
        ]

    def capacity(self) -> Capacity:
        return self.can_do

    def holds(self, image: bytes, _: str) -> bool:
        return image in self.known

    def refused(self) -> None:
        self.refusals += 1

    def ingress_replicas(self) -> int:
        return 0

    async def features(self, image: bytes, owner: str) -> ImageFeatures:
        self.encoded.append(image)
        self.owners.append(owner)
        if self.together:
            await self.together.wait()
        if image in self.held:
            try:
                await self.held[image].wait()
            except asyncio.CancelledError:
                self.abandoned.append(image)
                raise
        if image in self.failures:
            raise self.failures[image]
        return ImageFeatures(image.hex(), b"", (0, 8), "float32", encode_s=self.encode_s)

    async def generate(
        self, features: ImageFeatures, prompt: str, params: SamplingParams
    ) -> Completion:
        self._record(prompt, params)
        answers = [pieces_of(features, index) for index in range(params.n)]
        choices = [
            Choice(TOKEN_IDS, "".join(pieces), self.finish_reason, logprobs_of(pieces, params))
            for pieces in answers
        ]
        return Completion(tuple(choices), PROMPT_TOKENS)

    async def stream(
        self, features: ImageFeatures, prompt: str, params: SamplingParams
    ) -> AsyncGenerator[TokenEvent, None]:
        try:
            self._record(prompt, params)
            answers = [pieces_of(features, index) for index in range(params.n)]
            for i, token in enumerate(TOKEN_IDS):
                if i == self.stream_fails_after:
                    raise self.stream_failure
                reason = self.finish_reason if i == len(TOKEN_IDS) - 1 else None
                if params.show_beams:
                    yield TokenEvent((), "", None, PROMPT_TOKENS, beams=BEAMS)
                for index, pieces in enumerate(answers):
                    logprobs = logprobs_of(pieces, params)[i : i + 1]
                    last = reason is not None and index == params.n - 1
                    yield TokenEvent(
                        (token,),
                        pieces[i],
                        reason,
                        PROMPT_TOKENS,
                        index,
                        logprobs,
                        last,
                        queue_s=0 if i else self.queue_s,
                        resumed=i == self.loses_replica_after,
                    )
                while self.endless:
                    await asyncio.sleep(0)
                    yield TokenEvent((token,), " more", None, PROMPT_TOKENS)
        finally:
            self.stream_closed.set()

    async def metrics_urls(self) -> dict[str, str]:
        return self.metrics_pages

    def _record(self, prompt: str, params: SamplingParams) -> None:
        self.prompts.append(prompt)
        self.params.append(params)
        if self.generation_failure is not None:
            raise self.generation_failure


def pieces_of(features: ImageFeatures, index: int) -> list[str]:
    number = f" {index}" if index else ""
    first = f" {bytes.fromhex(features.digest).decode()}:{PIECES[0]}"
    return [first, *PIECES[1:-1], f"{PIECES[-1]}{number}"]


def logprobs_of(pieces: list[str], params: SamplingParams) -> tuple[TokenLogprob, ...]:
    if params.top_logprobs is None:
        return ()
    top = tuple(TokenLogprob(i, -2.0, b"?") for i in range(params.top_logprobs))
    tokens = zip(TOKEN_IDS, pieces, strict=True)
    return tuple(TokenLogprob(token, -0.5, piece.encode(), top) for token, piece in tokens)


@asynccontextmanager
async def client_of(
    backend: FakeBackend,
    config: AppConfig | None = None,
    recorder: FakeRecorder | None = None,
) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(backend, config or AppConfig(), recorder or FakeRecorder())
    async with client_of_app(app) as client:
        yield client


def client_of_app(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def image_part(image: bytes = b"picture", **more: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(image), **more}}


def user(*images: bytes, text: str = "what is it?") -> dict[str, Any]:
    return {
        "role": "user",
        "content": [*map(image_part, images), {"type": "text", "text": text}],
    }


def chat(**more: Any) -> dict[str, Any]:
    return {"messages": [user(b"picture")], **more}


def body_for(route: str, **more: Any) -> dict[str, Any]:
    """Returns a valid body for any of ROUTES."""
    return chat(**more) if "chat" in route else {"image": data_url(b"picture"), **more}


async def post(client: httpx.AsyncClient, route: str, body: Any) -> httpx.Response:
    """Posts `body` as JSON, in which NaN is allowed, or as it is if it is bytes."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await client.post(route, content=content, headers={"content-type": "application/json"})


def error_of(response: httpx.Response) -> dict[str, Any]:
    """Returns the error in a response and asserts that it has OpenAI's shape."""
    body = response.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    return error


def events_of(response: httpx.Response) -> list[Any]:
    """Returns the parsed server-sent events of a response; "[DONE]" stays a string."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, rest = response.text.split("\n\n")
    assert rest == ""
    payloads = [event.removeprefix("data: ") for event in events]
    return [p if p == "[DONE]" else json.loads(p) for p in payloads]
