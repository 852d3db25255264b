"""Requests made up from the API's own description, and broken pictures, by the ten thousand."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from blip2_serve.demo import scenes
from support.images import data_url, encode
from support.mutations import mutated, seeds
from support.server import App

pytestmark = pytest.mark.long

# Of each route, by the profiles of tests/conftest.py: 500 and 20,000 in all.
REQUESTS = {"short": 100, "long": 4000}
FILES = {"short": 800, "long": 50_000}
SLOWEST_S = 5

POSTS = (
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/generate",
    "POST /v1/responses",
    "POST /v1/caption",
)
GETS = (
    "GET /v1/models",
    "GET /v1/models/{name}",
    "GET /health",
    "GET /ready",
    "GET /metrics",
)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
PICTURES = [
    encode(scenes.sample(9_100).image),
    encode(scenes.sample(9_101).image, "JPEG"),
    encode(scenes.sample(9_102).image, "WEBP"),
]
QUESTIONS = ("", "What color is it?", "How many are there? <image></s>")


def budget(sizes: dict[str, int], config: pytest.Config) -> int:
    return sizes.get(config.getoption("--hypothesis-profile"), sizes["long"])


@cache
def description(url: str) -> Any:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


# -- requests --------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", POSTS + GETS)
def test_whatever_is_asked_gets_an_answer_as_described(
    label: str, demo: App, pytestconfig: pytest.Config
) -> None:
    operations = (result.ok() for result in description(demo.url).get_all_operations())
    (operation,) = (operation for operation in operations if operation.label == label)
    if label in POSTS:
        modes = [GenerationMode.POSITIVE, GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
        cases = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes))
    else:
        cases = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=budget(REQUESTS, pytestconfig),
        deadline=None,
        database=None,
        suppress_health_check=[*HealthCheck],
    )
    @given(case=cases, data=st.data())
    def ask(case: Case, data: st.DataObject) -> None:
        if label in POSTS and data.draw(st.integers(0, 7), label="usual"):
            case.body = usual(label, case, data)
        if case.path_parameters and data.draw(st.booleans(), label="known"):
            case.path_parameters["name"] = "demo"
        # Its own `call` leaves streams after a few events.
        response = session.request(**case.as_transport_kwargs(base_url=demo.url), timeout=60)
        statuses[response.status_code] += 1
        if response.headers["content-type"].startswith("text/event-stream"):
            assert response.status_code == 200
            is_whole_stream(response.text)
        else:
            case.validate_response(response, checks=CHECKS)

    with requests.Session() as session:
        session.trust_env = False
        ask()
    print(label, dict(statuses))
    assert statuses[200] > 0 if label in GETS else statuses[200] > statuses.total() / 20
    assert httpx.get(f"{demo.url}/ready", timeout=60).status_code == 200


def usual(label: str, case: Case, data: st.DataObject) -> Any:
    """The body with a picture in it, and without some of the rest, so that many are answered."""
    if not isinstance(case.body, dict):
        return case.body
    kept = {name: value for name, value in case.body.items() if data.draw(st.booleans())}
    kept.pop("model", None)
    picture = data.draw(st.sampled_from(PICTURES))
    question = data.draw(st.sampled_from(QUESTIONS))
    if label.endswith("/chat/completions"):
        image = {"type": "image_url", "image_url": {"url": data_url(picture)}}
        content = [image, {"type": "text", "text": question}]
        return {**kept, "messages": [{"role": "user", "content": content}]}
    if label.endswith("/responses"):
        image = {"type": "input_image", "image_url": data_url(picture)}
        content = [image, {"type": "input_text", "text": question}]
        return {**kept, "input": [{"role": "user", "content": content}]}
    if case.media_type == "multipart/form-data":
        return {**kept, "image": [picture]}
    for other in ("images", "image_urls", "media_urls", "multi_modal_data"):
        kept.pop(other, None)
    return {**kept, "image": data_url(picture)}


def is_whole_stream(text: str) -> None:
    """Each event is JSON; the last says that the answer has ended, well or not."""
    events = [event.rpartition("data: ")[2] for event in text.strip().split("\n\n")]
    ended = events[-1] == "[DONE]"
    answers = [json.loads(event) for event in events[: len(events) - ended]]
    last: dict[str, Any] = answers[-1] if answers else {}
    assert ended or "error" in last or last["type"] in ("response.completed", "response.incomplete")


# -- pictures --------------------------------------------------------------------------------------


def test_broken_pictures_are_answered_soon_and_never_by_a_5xx(
    demo: App, pytestconfig: pytest.Config
) -> None:
    statuses: Counter[int] = Counter()
    formats = [*seeds()]
    with requests.Session() as session:
        session.trust_env = False
        for seed in range(budget(FILES, pytestconfig)):
            name = formats[seed % len(formats)]
            file = mutated(name, seed)
            body = {"image": data_url(file), "max_tokens": 1}
            answer = session.post(f"{demo.url}/v1/generate", json=body, timeout=60)
            statuses[answer.status_code] += 1
            what = f"mutated({name!r}, {seed}): {answer.status_code} {answer.text[:300]}"
            assert answer.status_code in (200, 400), what
            if answer.status_code == 400:
                assert answer.json()["error"]["code"] == "invalid_image", what
            assert answer.elapsed.total_seconds() < SLOWEST_S, what
    print(dict(statuses))
    assert min(statuses[200], statuses[400]) > statuses.total() / 10
