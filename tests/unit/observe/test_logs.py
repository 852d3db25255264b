"""Logs report the server's failures but not the clients' mistakes, and name the request."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
from ray import serve
from ray.serve import context

from blip2_serve.config import LogFormat
from blip2_serve.errors import InvalidImage, Unavailable
from blip2_serve.observe import logs
from blip2_serve.observe.logs import is_news


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


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """Restores the loggers afterwards."""
    logger, serves = logging.getLogger("blip2_serve"), logging.getLogger("ray.serve")
    before = (logger.handlers, logger.level, logger.propagate, serves.filters)
    # As in a new process. pytest adds handlers to loggers that do not propagate.
    logger.handlers, logger.propagate, serves.filters = [], True, []
    yield
    logger.handlers, logger.level, logger.propagate, serves.filters = before


class Replica:
    app_name, deployment = "app", "Encoder"

    class replica_id:  # noqa: N801
        unique_id = "abc"


def log(log_format: LogFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs a plain line within a request, and an exception outside of any."""
    monkeypatch.setattr(serve, "get_replica_context", Replica)
    logs.configure(log_format)
    logger = logging.getLogger("blip2_serve.stages.encoder")
    request = context._RequestContext(request_id="r1")
    token = context._serve_request_context.set(request)  # type: ignore[arg-type]
    try:
        logger.info("%d images\nin two lines", 3)
    finally:
        context._serve_request_context.reset(token)
    try:
        raise ZeroDivisionError("none")
    except ZeroDivisionError:
        logger.exception("failed")


def test_a_line_names_its_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log("text", monkeypatch)
    written = capsys.readouterr().err
    first, *_ = written.splitlines()

    assert first.endswith(" INFO r1 3 images")
    assert " ERROR - failed\nTraceback" in written


def test_a_json_line_is_a_whole_record(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log("json", monkeypatch)
    first, second = map(json.loads, capsys.readouterr().err.splitlines())

    assert first.pop("asctime").endswith("Z")
    assert first == {
        "levelname": "INFO",
        "message": "3 images\nin two lines",
        "request_id": "r1",
        "application": "app",
        "deployment": "Encoder",
        "replica": "abc",
    }
    assert second["request_id"] == "-"
    assert "ZeroDivisionError: none" in second["exception"]
