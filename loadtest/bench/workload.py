"""The requests of benchmarks: an endless stream of questions, each about a new picture."""

from __future__ import annotations

import base64
import io
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 640, 480
MIN_QUALITY, MAX_QUALITY = 76, 90
# Layers of noise: cells across, and weight. Clouds, shapes, texture, grain.
NOISE = ((4, 1.0), (16, 0.4), (80, 0.3), (320, 0.15), (WIDTH, 0.12))

MIN_WORDS, MAX_WORDS = 4, 14
MIN_TOKENS, MAX_TOKENS = 8, 56
STRATA = 7

_TEXT = (
    "what which where how who is are was does do many much the a this that these in on at of to "
    "under behind between near left right top bottom corner middle picture photo image scene "
    "color shape size people person man woman child dog cat bird horse car bus train boat road "
    "street house window door table chair tree grass sky water snow food plate cup red blue green "
    "yellow white black small large old new doing holding wearing standing looking"
)
WORDS = _TEXT.split()


@dataclass(frozen=True)
class Request:
    question: str  # empty: a caption
    picture: str  # data URL
    max_tokens: int
    earlier: tuple[tuple[str, str], ...] = ()  # questions of the same chat with their answers
    more: dict[str, Any] = field(default_factory=dict)  # further fields of the body

    @property
    def tokens(self) -> int:
        """The tokens of all answers together."""
        return self.max_tokens * int(self.more.get("n", 1))

    def body(self, model: str, *, stream: bool) -> dict[str, Any]:
        """The request as a body for OpenAI's chat completions."""
        turns = [
            message
            for question, answer in self.earlier
            for message in (_message("user", question), _message("assistant", answer))
        ]
        first, *later = [*turns, _message("user", self.question)]
        content = [
            {"type": "image_url", "image_url": {"url": self.picture}},
            {"type": "text", "text": first["content"]},
        ]
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        return {
            "model": model,
            "messages": [{"role": "user", "content": content}, *later],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            **(streaming if stream else {}),
            **self.more,
        }


def _message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


class Workload:
    """Requests by seed. Pictures are drawn in advance into a stock, and none is sent twice."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._stock: deque[str] = deque()
        self._made = 0
        self.made_late = 0  # pictures missing from the stock, drawn at the client's expense

    def prepare(self, pictures: int) -> None:
        """Fills the stock up to this number of pictures; each takes some 15 ms."""
        while len(self._stock) < pictures:
            self._stock.append(self._make())

    def requests(self, *series: int) -> Iterator[Request]:
        """Endless. The same series asks the same questions with the same lengths."""
        rng = random.Random(f"{self._seed} {series}")
        for max_tokens in lengths(rng):
            words = rng.randint(MIN_WORDS, MAX_WORDS)
            yield Request(question(rng, words), self._take(), max_tokens)

    def _take(self) -> str:
        if self._stock:
            return self._stock.popleft()
        self.made_late += 1
        return self._make()

    def _make(self) -> str:
        self._made += 1
        return data_url(picture(np.random.default_rng((self._seed, self._made))))


def question(rng: random.Random, words: int) -> str:
    return f"{' '.join(rng.choices(WORDS, k=words))}?"


def lengths(rng: random.Random) -> Iterator[int]:
    """Uniform from MIN_TOKENS to MAX_TOKENS, stratified.

    Every seven in a row hold one of each seventh of the range, in random order, so any few requests
    are as much work as any other few.
    """
    size = (MAX_TOKENS - MIN_TOKENS + 1) // STRATA
    while True:
        for stratum in rng.sample(range(STRATA), STRATA):
            yield MIN_TOKENS + stratum * size + rng.randrange(size)


def data_url(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def picture(rng: np.random.Generator) -> bytes:
    """A JPEG with a photograph's size and detail (50 to 120 KB): noise at several scales."""
    canvas = Image.new("RGB", (WIDTH, HEIGHT))
    for cells, weight in NOISE:
        size = (cells, cells * HEIGHT // WIDTH)
        noise = Image.frombytes("RGB", size, rng.bytes(3 * size[0] * size[1]))
        smooth = noise.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
        canvas = Image.blend(canvas, smooth, weight)
    buffer = io.BytesIO()
    quality = int(rng.integers(MIN_QUALITY, MAX_QUALITY))
    canvas.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
