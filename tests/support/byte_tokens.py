"""A vocabulary for the engine in which token i is byte i, followed by two end tokens."""

from __future__ import annotations

EOS, OTHER_EOS = 256, 257


def tokens(text: str, *more: int) -> list[int]:
    """Returns the tokens of a text, followed by `more`."""
    return [*text.encode(), *more]


def decode(ids: list[int]) -> str:
    return bytes(i for i in ids if i < EOS).decode("utf-8", errors="replace")
