"""n answers at temperature 0 are equal: one is computed, and n are returned."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import httpx
import pytest

from blip2_serve.config import AppConfig
from blip2_serve.http.service import ModelCall, Service
from blip2_serve.types import SamplingParams
from support.fake_backend import (
    PROMPT_TOKENS,
    ROUTES,
    TOKEN_IDS,
    FakeBackend,
    body_for,
    client_of,
    events_of,
    post,
)
from support.recorder import FakeRecorder

GREEDY = {"n": 3, "temperature": 0}


@pytest.mark.parametrize(
    ("params", "computed"),
    [
        pytest.param(SamplingParams(n=3), 1, id="greedy"),
        pytest.param(SamplingParams(n=3, top_logprobs=2), 1, id="greedy, with log-probabilities"),
        pytest.param(SamplingParams(n=3, temperature=0.5), 3, id="samples"),
        pytest.param(SamplingParams(n=3, num_beams=4), 3, id="the best of four beams"),
        pytest.param(SamplingParams(), 1, id="one answer"),
    ],
)
async def test_only_equal_answers_are_copied(params: SamplingParams, computed: int) -> None:
    backend = FakeBackend()
    service = Service(backend, AppConfig(), FakeRecorder())
    completion = await service.complete(ModelCall(b"picture", "", params))

    assert backend.params == [replace(params, n=computed)]
    assert len(completion.choices) == params.n
    assert len({*completion.choices}) == computed
    assert completion.completion_tokens == params.n * len(TOKEN_IDS)


@pytest.mark.parametrize("route", ROUTES[:2])
async def test_equal_choices_are_whole_and_all_count(
    client: httpx.AsyncClient, backend: FakeBackend, route: str
) -> None:
    logprobs = {"logprobs": True, "top_logprobs": 1} if "chat" in route else {"logprobs": 1}
    one = (await post(client, route, body_for(route, temperature=0, **logprobs))).json()
    body = (await post(client, route, body_for(route, **GREEDY, **logprobs))).json()

    assert [params.n for params in backend.params] == [1, 1]
    assert body["choices"] == [{**one["choices"][0], "index": index} for index in range(3)]
    assert body["usage"] == {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": 3 * len(TOKEN_IDS),
        "total_tokens": PROMPT_TOKENS + 3 * len(TOKEN_IDS),
    }


@pytest.mark.parametrize("route", ROUTES[:2])
async def test_equal_answers_are_streamed_side_by_side(
    client: httpx.AsyncClient, backend: FakeBackend, route: str
) -> None:
    logprobs = {"logprobs": True} if "chat" in route else {"logprobs": 0}
    stream = {"stream": True, "stream_options": {"include_usage": True}, **logprobs}
    response = await post(client, route, body_for(route, **GREEDY, **stream, return_token_ids=True))

    *chunks, total, done = events_of(response)
    assert done == "[DONE]"
    assert backend.params[0].n == 1
    assert total["usage"]["completion_tokens"] == 3 * len(TOKEN_IDS)
    by_index: defaultdict[int, list[Any]] = defaultdict(list)
    for chunk in chunks:
        (choice,) = chunk["choices"]
        by_index[choice.pop("index")].append(choice)
    assert sorted(by_index) == [0, 1, 2]
    assert by_index[0] == by_index[1] == by_index[2]
    ids = [token for choice in by_index[2] for token in choice.get("token_ids", ())]
    assert ids == list(TOKEN_IDS)
    assert by_index[2][-1]["finish_reason"] == "stop"


async def test_captions_may_ask_for_equal_answers() -> None:
    backend = FakeBackend()
    async with client_of(backend) as client:
        body = (await post(client, ROUTES[2], body_for(ROUTES[2], n=2))).json()

    (item,) = body["data"]
    assert item["captions"] == [item["caption"]] * 2
    assert backend.params[0].n == 1
