"""The errors: status and body of each class, pickling and copying."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest

from blip2_serve.errors import (
    Blip2ServeError,
    ContextLengthExceeded,
    InvalidImage,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    Quarantined,
    RateLimited,
    RequestTooLarge,
    StartupError,
    TimedOut,
    Unauthorized,
    Unavailable,
    WrongCheckpoint,
)

HTTP = {
    Blip2ServeError: (500, "server_error", None),
    InvalidRequest: (400, "invalid_request_error", None),
    InvalidImage: (400, "invalid_request_error", "invalid_image"),
    ContextLengthExceeded: (400, "invalid_request_error", "context_length_exceeded"),
    Unauthorized: (401, "invalid_request_error", "invalid_api_key"),
    ModelNotFound: (404, "invalid_request_error", "model_not_found"),
    RequestTooLarge: (413, "invalid_request_error", "request_too_large"),
    TimedOut: (408, "server_error", "timeout"),
    Unavailable: (503, "server_error", "unavailable"),
    WrongCheckpoint: (503, "server_error", "unavailable"),
    Overloaded: (429, "rate_limit_error", "overloaded"),
    RateLimited: (429, "rate_limit_error", "rate_limit_exceeded"),
    Quarantined: (500, "server_error", "quarantined"),
}


def classes(base: type[Blip2ServeError]) -> Iterator[type[Blip2ServeError]]:
    yield base
    for derived in base.__subclasses__():
        yield from classes(derived)


ALL = list(classes(Blip2ServeError))


def test_this_file_covers_every_error() -> None:
    assert set(ALL) == {*HTTP, StartupError}


@pytest.mark.parametrize("kind", HTTP)
def test_an_error_has_a_status_and_an_openai_body(kind: type[Blip2ServeError]) -> None:
    status, type_, code = HTTP[kind]
    error = kind("it is wrong", "field")

    assert error.status == status
    assert error.body() == {
        "error": {"message": "it is wrong", "type": type_, "param": "field", "code": code}
    }


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    "passed_on",
    [
        pytest.param(lambda e: pickle.loads(pickle.dumps(e)), id="pickled"),
        pytest.param(copy.copy, id="copied"),
    ],
)
def test_an_error_can_be_pickled_and_copied(
    kind: type[Blip2ServeError], passed_on: Callable[[Blip2ServeError], Blip2ServeError]
) -> None:
    error = kind("it is wrong", "field")
    error.param, error.status = "other field", 418
    arrived = passed_on(error)

    assert type(arrived) is kind
    assert arrived.status == 418
    assert arrived.param == "other field"
    assert arrived.message == "it is wrong"
    assert arrived.body() == error.body()


def test_a_status_set_on_one_error_does_not_change_the_class() -> None:
    InvalidRequest("one").status = 405

    assert InvalidRequest("two").status == 400


@pytest.mark.parametrize("kind", ALL)
def test_the_text_of_an_error_is_its_message(kind: type[Blip2ServeError]) -> None:
    assert str(kind("it is wrong", "field")) == "it is wrong"


def test_about_returns_a_copy_that_names_another_field() -> None:
    shared = InvalidImage("broken", kind="format")
    copies = [shared.about("image"), shared.about("messages")]

    assert [error.param for error in copies] == ["image", "messages"]
    assert shared.param is None
    again = pickle.loads(pickle.dumps(copies[0]))
    assert (again.message, again.param, again.kind) == ("broken", "image", "format")


def test_the_time_to_wait_survives_pickling_and_is_a_header_in_whole_seconds() -> None:
    error = Overloaded("busy", retry_after_s=2.2)

    assert pickle.loads(pickle.dumps(error)).headers() == {"Retry-After": "3"}
    assert Unavailable("gone").headers() == {}


@pytest.mark.parametrize("kind", [TimedOut, Quarantined])
def test_clients_are_told_not_to_repeat_what_would_fail_again(kind: type[Blip2ServeError]) -> None:
    assert kind("it failed").headers() == {"x-should-retry": "false"}
