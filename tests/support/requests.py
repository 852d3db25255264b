"""Requests for the engine."""

from __future__ import annotations

from typing import Any

from blip2_serve.engine.sequence import Request
from blip2_serve.types import SamplingParams


def make_request(
    name: str = "a",
    prompt: int | list[int] = 3,
    *,
    image: Any = None,
    digest: str = "picture",
    max_tokens: int = 1,
    **params: Any,
) -> Request:
    """Makes a request. `prompt` is its tokens or their number; `params` are SamplingParams."""
    tokens = [7] * prompt if isinstance(prompt, int) else prompt
    sampling = SamplingParams(max_tokens=max_tokens, **params)
    return Request(name, tokens, image, digest, sampling)
