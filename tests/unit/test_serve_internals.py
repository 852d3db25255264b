"""Private names of Ray Serve still mean what this package takes them for."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from typing import Any

import opentelemetry.context
import pytest
from ray.serve import context

from blip2_serve import serve_internals


@pytest.fixture
def request_under_way() -> Iterator[None]:
    """The code of the test runs for a request, as in a replica of Ray Serve."""
    about: Any = context._RequestContext(
        request_id="public", _internal_request_id="internal", app_name="blip2"
    )
    token = context._serve_request_context.set(about)
    yield
    context._serve_request_context.reset(token)


def test_code_that_works_for_no_request_has_an_empty_id() -> None:
    assert contextvars.Context().run(serve_internals.request_id) == ""


@pytest.mark.usefixtures("request_under_way")
def test_code_that_works_for_a_request_has_its_public_id() -> None:
    assert serve_internals.request_id() == "public"


@pytest.mark.usefixtures("request_under_way")
def test_a_detached_task_is_named_after_the_request_but_not_cancelled_with_it() -> None:
    detached = serve_internals.detached_context().run(context._get_serve_request_context)

    assert (detached.request_id, detached.app_name) == ("public", "blip2")
    assert detached._internal_request_id == ""


def test_a_detached_task_stays_in_the_trace() -> None:
    token = opentelemetry.context.attach(opentelemetry.context.set_value("trace", "of a client"))
    try:
        detached = serve_internals.detached_context()
    finally:
        opentelemetry.context.detach(token)

    assert detached.run(opentelemetry.context.get_value, "trace") == "of a client"
