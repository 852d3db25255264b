"""Requests after public bug reports about parameters, with the right answers.

"As X" means the same parameters for the model; that those give the same tokens is tested in
tests/serve/test_parameters.py, as is the time limit through Ray Serve's proxy.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from support.fake_backend import FakeBackend, chat, client_of, error_of, post

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("sent", "like"),
    [
        pytest.param(
            {"temperature": 0, "top_p": 0.95}, {"temperature": 0}, id="candle-vllm #307: top_p at 0"
        ),
        pytest.param({"temperature": 0, "top_k": 50}, {"temperature": 0}, id="top_k at 0"),
        pytest.param(
            {"temperature": 0.7, "top_p": 0}, {"temperature": 0}, id="TGI #2222: top_p 0 is greedy"
        ),
        pytest.param({"top_p": 0}, {}, id="top_p 0 alone is greedy"),
        pytest.param(
            {"reasoning_effort": None}, {}, id="hebo-gateway #208: null for reasoning_effort"
        ),
        pytest.param(
            dict.fromkeys(
                ("tools", "response_format", "stream_options", "logit_bias", "n", "stop")
            ),
            {},
            id="null for whatever the client's author left empty",
        ),
        pytest.param(
            {"parallel_tool_calls": True, "verbosity": "low", "service_tier": "flex"},
            {},
            id="parameters without effect on text",
        ),
        pytest.param({"stop": ""}, {}, id="an empty stop string"),
        pytest.param({"stop": ["", "\n"]}, {"stop": "\n"}, id="an empty stop string in a list"),
        pytest.param({"top_p": 1, "n": 1, "temperature": None}, {}, id="neutral values"),
        pytest.param({"top_p": 0.9}, {"top_p": 0.9, "temperature": 1}, id="top_p asks for samples"),
        pytest.param({"n": 2}, {"n": 2, "temperature": 1}, id="n asks for samples"),
    ],
)
async def test_a_request_is_as_another(sent: dict[str, Any], like: dict[str, Any]) -> None:
    backend = FakeBackend()
    async with client_of(backend) as client:
        for more in (sent, like):
            response = await post(client, CHAT, chat(seed=7, **more))
            assert response.status_code == 200, response.text

    assert backend.params[0] == backend.params[1]


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        pytest.param(
            {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", id="a real tool"
        ),
        pytest.param({"response_format": {"type": "json_object"}}, "response_format", id="JSON"),
        pytest.param({"modalities": ["text", "audio"]}, "modalities", id="audio"),
        pytest.param({"reasoning": None}, "reasoning", id="a name that is nobody's, though null"),
        pytest.param({"top_p": 1.5}, "top_p", id="top_p above 1"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(sent: dict[str, Any], param: str) -> None:
    async with client_of(FakeBackend()) as client:
        response = await post(client, CHAT, chat(**sent))

    assert response.status_code == 400
    assert error_of(response)["param"] == param


class Slow(FakeBackend):
    async def generate(self, *_: object) -> None:  # type: ignore[override]
        await asyncio.Event().wait()


async def test_a_time_limit_of_the_client_is_a_408_in_openais_shape() -> None:
    """Ray #37942."""
    headers = {"x-request-timeout-seconds": "0.05", "content-type": "application/json"}
    async with client_of(Slow()) as client, asyncio.timeout(20):
        response = await client.post(CHAT, content=json.dumps(chat()), headers=headers)

    assert response.status_code == httpx.codes.REQUEST_TIMEOUT
    assert error_of(response)["code"] == "timeout"
