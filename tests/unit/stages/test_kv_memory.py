"""A generator without memory for the KV does not start, and says with numbers why."""

from __future__ import annotations

import pytest

from blip2_serve.config import AppConfig
from blip2_serve.errors import StartupError
from blip2_serve.stages import generator


def test_too_little_memory_is_told_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "free_memory", lambda _: 96_000)
    with pytest.raises(StartupError) as error:
        generator._load(AppConfig(dtype="float32"), "cpu")

    assert "memory for 6 KV rows" in error.value.message
    assert "needs 10 rows of 4,096 bytes" in error.value.message
    assert "kv_memory_fraction" in error.value.message


def test_too_few_rows_that_were_asked_for_are_told_with_the_key() -> None:
    config = AppConfig.model_validate({"dtype": "float32", "generator": {"kv_slots": 9}})
    with pytest.raises(StartupError, match=r"kv_slots is 9, but .* needs 10 rows"):
        generator._load(config, "cpu")
