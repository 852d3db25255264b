"""Logs tell of the server's failures, not of the clients' mistakes."""

from __future__ import annotations

import logging

import pytest

from blip2_serve.errors import InvalidImage, Unavailable
from blip2_serve.logs import is_news


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        pytest.param(InvalidImage("not an image", "image"), False, id="a client's mistake"),
        pytest.param(Unavailable("gone"), True, id="a failure of a stage"),
        pytest.param(ZeroDivisionError(), True, id="a bug"),
        pytest.param(None, True, id="no error at all"),
    ],
)
def test_a_clients_mistake_is_not_logged_as_a_failure(error: Exception | None, kept: bool) -> None:
    info = (type(error), error, None) if error else None
    record = logging.LogRecord("ray.serve", logging.ERROR, "", 0, "Request failed.", (), info)
    assert is_news(record) == kept
