"""The reason why a replica cannot start becomes the application's error."""

from __future__ import annotations

import pytest
from ray import serve

from blip2_serve.cli.running import startup_error
from support.server import start_app

pytestmark = pytest.mark.long  # Serve tries a replica several times

NAME = "too-few-slots"


def test_too_few_kv_slots_are_reported_as_the_startup_error(base_url: str) -> None:
    with pytest.raises(RuntimeError):
        start_app(base_url, NAME, {"dtype": "float32", "generator": {"kv_slots": 9}})
    reason = startup_error(NAME)
    serve.delete(NAME)

    assert reason is not None
    assert reason.startswith("generator.kv_slots is 9, but the shortest request needs 10 slots")
