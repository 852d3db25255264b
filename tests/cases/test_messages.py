"""Messages, data URLs, transport and presets as clients send them, after public bug reports."""

from __future__ import annotations

import base64
import codecs
import json
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import yaml

from blip2_serve.config import AppConfig
from blip2_serve.http.api import create_app
from blip2_serve.http.openai import ChatShape, Writer
from blip2_serve.http.presets import PRESETS, without_instructions
from blip2_serve.ingress_config import VQA_INSTRUCTIONS
from blip2_serve.types import SamplingParams, TokenEvent
from support.fake_backend import (
    ROUTES,
    FakeBackend,
    body_for,
    chat,
    client_of,
    data_url,
    error_of,
    image_part,
    post,
    user,
)
from support.monitoring import needs, write_rules
from support.recorder import FakeRecorder

CHAT, GENERATE, CAPTION, _ = ROUTES
Messages = list[dict[str, Any]]


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def client(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(backend) as client:
        yield client


def says(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


# -- history ---------------------------------------------------------------------------------------

Q1 = user(b"picture", text="Q1")
Q2 = says("user", "Q2")
JOINED = "Question: Q1 Q2 Answer:"


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        pytest.param(
            [Q1, says("assistant", None), Q2], JOINED, id="freellmapi #165: an answer that is null"
        ),
        pytest.param([Q1, {"role": "assistant"}, Q2], JOINED, id="an answer without content"),
        pytest.param([Q1, says("assistant", ""), Q2], JOINED, id="an empty answer"),
        pytest.param([Q1, says("assistant", " .\n"), Q2], JOINED, id="an answer of no words"),
        pytest.param([Q1, says("assistant", []), Q2], JOINED, id="an answer of no parts"),
        pytest.param([Q1, says("assistant", [text_part("")]), Q2], JOINED, id="an empty part"),
        pytest.param(
            [Q1, says("assistant", [{"type": "refusal", "refusal": "No."}]), Q2],
            "Question: Q1 Answer: No. Question: Q2 Answer:",
            id="a refusal as a part",
        ),
        pytest.param(
            [Q1, {"role": "assistant", "content": None, "refusal": "No."}, Q2],
            "Question: Q1 Answer: No. Question: Q2 Answer:",
            id="a refusal beside no content",
        ),
        pytest.param(
            [Q1, {"role": "assistant", "content": "A1", "refusal": "No."}, Q2],
            "Question: Q1 Answer: A1. Question: Q2 Answer:",
            id="a refusal beside content",
        ),
        pytest.param(
            [Q1, says("assistant", [text_part("A"), text_part(" "), text_part("1")]), Q2],
            "Question: Q1 Answer: A 1. Question: Q2 Answer:",
            id="an answer of several parts",
        ),
        pytest.param(
            [says("assistant", "Hello"), Q1], "Hello. Question: Q1 Answer:", id="a greeting first"
        ),
        pytest.param(
            [says("user", "hi"), says("assistant", "Hello"), Q1],
            "Question: hi Answer: Hello. Question: Q1 Answer:",
            id="a greeting before the image",
        ),
        pytest.param(
            [Q1, says("assistant", "A1."), says("assistant", "A2"), Q2],
            "Question: Q1 Answer: A1. A2. Question: Q2 Answer:",
            id="two answers",
        ),
        pytest.param([Q1, Q2], JOINED, id="two questions"),
        pytest.param([Q1, says("assistant", "")], "Question: Q1 Answer:", id="a placeholder last"),
        pytest.param(
            [Q1, says("assistant", "A1"), says("system", "Be brief."), Q2],
            "Be brief. Question: Q1 Answer: A1. Question: Q2 Answer:",
            id="Rapid-MLX #1543: a system message between",
        ),
        pytest.param(
            [Q1, says("developer", "Be brief."), says("system", [text_part("In English.")])],
            "Be brief. In English. Question: Q1 Answer:",
            id="system messages last",
        ),
        pytest.param(
            [says("system", None), {"role": "developer"}, Q1],
            "Question: Q1 Answer:",
            id="system messages without content",
        ),
        pytest.param(
            [says("user", [text_part("Q1"), text_part(""), image_part(), text_part("now")])],
            "Question: Q1 now Answer:",
            id="texts around the image, one of them empty",
        ),
        pytest.param(
            [
                says("user", "Q1"),
                says("assistant", "A1"),
                says("user", [{"type": "image_url", "image_url": data_url(b"picture")}]),
                Q2,
            ],
            "Question: Q1 Answer: A1. Question: Q2 Answer:",
            id="the image's URL as a string",
        ),
        pytest.param(
            [
                {**Q1, "name": "me", "tool_calls": None, "tool_call_id": None},
                {
                    **says("assistant", "A1"),
                    "name": "model",
                    "refusal": None,
                    "annotations": [],
                    "audio": None,
                    "function_call": None,
                    "tool_calls": [],
                    "parsed": None,
                    "reasoning_content": "It looks round.",
                    "provider_specific_fields": {"refusal": None},
                },
                Q2,
            ],
            "Question: Q1 Answer: A1. Question: Q2 Answer:",
            id="all that clients send back of an answer",
        ),
    ],
)
async def test_history_is_understood_as_clients_send_it(
    client: httpx.AsyncClient, backend: FakeBackend, messages: Messages, prompt: str
) -> None:
    response = await post(client, CHAT, {"messages": messages})

    assert response.status_code == 200, response.text
    assert backend.prompts == [prompt]
    assert backend.encoded == [b"picture"]


@pytest.mark.parametrize(
    ("messages", "param", "word"),
    [
        pytest.param(
            [says("system", [text_part("a"), image_part()]), Q1],
            "messages[0].content[1]",
            "image",
            id="an image in a system message",
        ),
        pytest.param(
            [Q1, says("assistant", [image_part()]), Q2],
            "messages[1].content[0]",
            "image",
            id="an image in an answer",
        ),
        pytest.param(
            [says("user", [image_part(), {"type": "input_audio", "input_audio": {}}])],
            "messages[0].content[1]",
            "audio",
            id="audio",
        ),
        pytest.param(
            [Q1, says("user", [{"type": "file", "file": {"file_id": "a"}}])],
            "messages[1].content[0]",
            "file",
            id="a file",
        ),
        pytest.param(
            [Q1, says("user", [{"type": "video_url", "video_url": {"url": "a"}}])],
            "messages[1].content[0]",
            "video",
            id="a video",
        ),
        pytest.param(
            [Q1, {"role": "tool", "tool_call_id": "a", "content": "b"}],
            "messages[1].role",
            "tool",
            id="a tool's answer",
        ),
        pytest.param(
            [Q1, {**says("assistant", None), "tool_calls": [{"id": "a", "type": "function"}]}, Q2],
            "messages",
            "tool_calls",
            id="a call of a tool",
        ),
    ],
)
async def test_what_the_model_cannot_take_is_refused_by_name_and_place(
    client: httpx.AsyncClient, backend: FakeBackend, messages: Messages, param: str, word: str
) -> None:
    response = await post(client, CHAT, {"messages": messages})

    assert response.status_code == 400
    assert error_of(response)["param"] == param
    assert word in error_of(response)["message"]
    assert backend.prompts == []


# -- transport -------------------------------------------------------------------------------------

PICTURE = bytes(range(256)) * 3 + b"!"
BASE64 = base64.b64encode(PICTURE).decode()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "url",
    [
        pytest.param(
            f"data:image/png;base64,{quote(BASE64, safe='')}", id="markitdown #2481: escaped base64"
        ),
        pytest.param(
            f"data:;base64,{base64.urlsafe_b64encode(PICTURE).decode().rstrip('=')}",
            id="URL-safe, without padding or media type",
        ),
        pytest.param(f"DATA:image/png;base64,{BASE64[:5]} \n{BASE64[5:]}\n", id="blanks"),
    ],
)
async def test_every_form_of_data_url_is_the_same_picture(
    backend: FakeBackend, route: str, url: str
) -> None:
    seen: list[bytes] = []

    async def features(image: bytes, _: str) -> Any:
        seen.append(image)
        raise ConnectionAbortedError

    backend.features = features  # type: ignore[method-assign]
    body = json.dumps(body_for(route)).replace(data_url(b"picture"), json.dumps(url)[1:-1])
    async with client_of(backend) as client:
        await post(client, route, body.encode())

    assert seen == [PICTURE]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "encoded",
    [
        pytest.param(lambda text: codecs.BOM_UTF8 + text.encode(), id="Pode #1604: UTF-8"),
        pytest.param(lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"), id="UTF-16 LE"),
        pytest.param(lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"), id="UTF-16 BE"),
        pytest.param(lambda text: codecs.BOM_UTF32_LE + text.encode("utf-32-le"), id="UTF-32 LE"),
        pytest.param(lambda text: codecs.BOM_UTF32_BE + text.encode("utf-32-be"), id="UTF-32 BE"),
    ],
)
async def test_a_byte_order_mark_before_json_is_skipped(
    client: httpx.AsyncClient, backend: FakeBackend, route: str, encoded: Any
) -> None:
    response = await post(client, route, encoded(json.dumps(body_for(route))))

    assert response.status_code == 200, response.text
    assert backend.encoded == [b"picture"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("body", [codecs.BOM_UTF8, codecs.BOM_UTF8 + b"hi", codecs.BOM_UTF16_LE])
async def test_a_byte_order_mark_before_anything_else_is_a_400(
    client: httpx.AsyncClient, route: str, body: bytes
) -> None:
    response = await post(client, route, body)

    assert response.status_code == 400
    assert "BOM" not in error_of(response)["message"]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("/health", id="parbaked #564: health"),
        "/ready",
        "/metrics",
        "/v1/models",
        "/v1/models/demo",
        "/docs",
        "/openapi.json",
    ],
)
async def test_head_is_answered_like_get_without_a_body(
    client: httpx.AsyncClient, path: str
) -> None:
    got = await client.get(path)
    response = await client.head(path)

    assert response.status_code == got.status_code == 200
    assert response.headers["content-type"] == got.headers["content-type"]
    assert response.content == b""


async def test_no_body_is_sent_after_head(backend: FakeBackend) -> None:
    """Seen without httpx, which would hide it."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "HEAD",
        "path": "/health",
        "query_string": b"",
        "headers": [],
    }
    await create_app(backend, AppConfig(), FakeRecorder())(scope, receive, send)

    assert sent[0]["status"] == 200
    assert b"".join(message.get("body", b"") for message in sent) == b""


async def test_head_of_a_route_that_only_takes_posts_is_a_405(client: httpx.AsyncClient) -> None:
    response = await client.head(CHAT)

    assert (response.status_code, response.headers["allow"]) == (405, "POST")


PAGE = {"origin": "https://app.example.com"}
PREFLIGHT = {
    **PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


async def test_web_pages_may_not_call_by_default(client: httpx.AsyncClient) -> None:
    preflight = await client.options(CHAT, headers=PREFLIGHT)
    response = await client.get("/v1/models", headers=PAGE)

    assert preflight.status_code == 405
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize("allowed", ["https://app.example.com", "*"])
async def test_web_pages_of_configured_origins_may_call(backend: FakeBackend, allowed: str) -> None:
    config = AppConfig.model_validate({"ingress": {"cors_origins": [allowed]}})
    backend.failures[b"broken"] = KeyError("a bug")
    async with client_of(backend, config) as client:
        preflight = await client.options(CHAT, headers=PREFLIGHT)
        answers = [
            await client.post(CHAT, json=body, headers=PAGE)
            for body in (chat(), chat(n=99), {"messages": [user(b"broken")]})
        ]

    assert preflight.status_code == 200
    assert {"authorization", "content-type", "x-stainless-os"} <= {
        *preflight.headers["access-control-allow-headers"].replace(" ", "").split(",")
    }
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert [answer.status_code for answer in answers] == [200, 400, 500]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == allowed
        assert answer.headers["access-control-expose-headers"] == "x-request-id"


async def test_web_pages_of_other_origins_may_not_call(backend: FakeBackend) -> None:
    config = AppConfig.model_validate({"ingress": {"cors_origins": ["https://other.example.com"]}})
    async with client_of(backend, config) as client:
        preflight = await client.options(CHAT, headers=PREFLIGHT)
        answer = await client.post(CHAT, json=chat(), headers=PAGE)

    assert preflight.status_code == 400
    assert "access-control-allow-origin" not in answer.headers


LINE_ENDS = "a\x85b\u2028c\u2029d\r\n\v\f\x1c\x1d\x1e e\ud800"


async def test_an_event_is_one_line_for_clients_that_split_at_any_line_end() -> None:
    async def tokens() -> AsyncIterator[TokenEvent]:
        yield TokenEvent((1,), LINE_ENDS, "stop", last=True)

    writer = Writer(ChatShape, "naïve \u2028", return_token_ids=False)
    sent = b"".join([event async for event in writer.events(tokens(), lambda error: error)])  # type: ignore[arg-type,return-value]

    lines = [line for line in sent.decode().splitlines() if line]
    assert lines.pop() == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert text == LINE_ENDS
    assert "naïve \\u2028".encode() in sent


# -- presets and aliases ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "fields", "prompt"),
    [
        pytest.param(
            CAPTION, {"preset": "caption"}, "a photo of", id="LAVIS blip2_caption_opt2.7b.yaml"
        ),
        pytest.param(GENERATE, {"preset": "caption"}, "a photo of", id="a raw request"),
        pytest.param(
            CHAT,
            {"preset": "caption", "messages": [user(b"picture", text="")]},
            "a photo of",
            id="a chat without a question",
        ),
        pytest.param(CAPTION, {"preset": "caption", "prompt": "two"}, "two", id="a prompt"),
        pytest.param(CAPTION, {"preset": "caption", "prompt": ""}, "", id="an empty prompt"),
        pytest.param(GENERATE, {"preset": "caption", "prompt": ""}, "", id="an empty raw prompt"),
        pytest.param(CAPTION, {}, "", id="no preset"),
        pytest.param(CAPTION, {"preset": "vqa"}, "", id="vqa, which needs a question"),
        pytest.param(CHAT, {"preset": "vqa"}, "Question: what is it? Short answer:", id="vqa"),
        pytest.param(CHAT, {"preset": "caption"}, "Question: what is it? Answer:", id="a question"),
        pytest.param(CAPTION, {"model": "demo:caption"}, "a photo of", id="alias"),
        pytest.param(GENERATE, {"model": "demo:caption"}, "a photo of", id="alias, a raw request"),
    ],
)
async def test_a_preset_has_its_prompt(
    client: httpx.AsyncClient, backend: FakeBackend, route: str, fields: dict[str, Any], prompt: str
) -> None:
    response = await post(client, route, body_for(route, **fields))

    assert response.status_code == 200, response.text
    assert backend.prompts == [prompt]


async def test_an_upload_with_the_caption_preset_has_its_prompt(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    files = [("image", ("1.png", b"one"))]
    for data in (
        {"preset": "caption"},
        {"model": "demo:caption"},
        {"preset": "caption", "prompt": ""},
    ):
        assert (await client.post(CAPTION, files=files, data=data)).status_code == 200

    assert backend.prompts == ["a photo of", "a photo of", ""]


@pytest.mark.parametrize("name", ["demo", "org/model", "a:b"])
async def test_aliases_are_listed_found_and_echoed(backend: FakeBackend, name: str) -> None:
    async with client_of(backend, AppConfig(served_model_name=name)) as client:
        listed = [card["id"] for card in (await client.get("/v1/models")).json()["data"]]
        assert listed == [name, f"{name}:caption", f"{name}:vqa"]
        for alias in listed:
            found = await client.get(f"/v1/models/{quote(alias, safe='')}")
            assert found.json()["id"] == alias
            for route in ROUTES:
                answer = await post(client, route, body_for(route, model=alias))
                assert answer.json()["model"] == alias
        streamed = await post(client, CHAT, chat(model=f"{name}:vqa", stream=True))
        assert f'"model":"{name}:vqa"' in streamed.text
        for other in (f"{name}:haiku", f"{name}:", f"{name}:CAPTION"):
            assert (await post(client, CHAT, chat(model=other))).status_code == 404
        contradiction = await post(client, CHAT, chat(model=f"{name}:vqa", preset="caption"))

    assert contradiction.status_code == 400
    assert error_of(contradiction)["param"] == "preset"


WORD = "Answer the question using a single word or phrase."


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param("what is it?", id="no instruction"),
        pytest.param(f"what is it?\n{WORD}", id="on its own line"),
        pytest.param(f"what is it? {WORD.upper()}", id="in capitals"),
        pytest.param(f"what is it?\n\n{WORD[:-1]} \n", id="without its full stop"),
        pytest.param(f"what is it? {WORD.replace(' ', chr(10))}", id="wrapped"),
        pytest.param(f"what is it? Please {WORD.lower()}", id="please"),
        pytest.param(f"what is it? Please, answer briefly. {WORD}", id="two instructions"),
        pytest.param("what is it?\nShort answer:", id="a question as BLIP-2 has it"),
    ],
)
async def test_the_vqa_alias_drops_trailing_instructions(
    client: httpx.AsyncClient, backend: FakeBackend, asked: str
) -> None:
    for model in ("demo:vqa", "demo"):
        await post(client, CHAT, {"model": model, "messages": [user(b"picture", text=asked)]})

    as_it_is = f"Question: {asked.strip()} Answer:"
    assert backend.prompts == ["Question: what is it? Short answer:", as_it_is]


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(f"{WORD} what is it?", id="in front"),
        pytest.param(f"what is it?{WORD}", id="not separated"),
        pytest.param("what is it? Answer like a pirate.", id="not in the list"),
        pytest.param("which word or phrase.", id="only its end"),
    ],
)
async def test_the_vqa_alias_keeps_everything_else(
    client: httpx.AsyncClient, backend: FakeBackend, asked: str
) -> None:
    await post(client, CHAT, {"model": "demo:vqa", "messages": [user(b"picture", text=asked)]})

    assert backend.prompts == [f"Question: {asked} Short answer:"]


async def test_the_list_of_instructions_can_be_configured(backend: FakeBackend) -> None:
    chat_config = {"vqa_instructions": ["Like a pirate!"]}
    config = AppConfig.model_validate({"ingress": {"chat": chat_config}})
    async with client_of(backend, config) as client:
        for asked in ("what? like a  pirate!", f"what? {WORD}"):
            messages = [user(b"picture", text=asked)]
            await post(client, CHAT, {"model": "demo:vqa", "messages": messages})

    expected = ["Question: what? Short answer:", f"Question: what? {WORD} Short answer:"]
    assert backend.prompts == expected


async def test_the_vqa_alias_keeps_the_history_but_no_system_text(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    messages = [
        says("system", "You are a helpful assistant."),
        user(b"picture", text=f"Q1\n{WORD}"),
        says("assistant", "A1"),
        says("user", f"Q2\n{WORD}"),
    ]
    await post(client, CHAT, {"model": "demo:vqa", "messages": messages})

    assert backend.prompts == ["Question: Q1 Answer: A1. Question: Q2 Short answer:"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param(
            {"max_tokens": 1024, "temperature": 0},
            PRESETS["caption"],
            id="a limit above the preset's",
        ),
        pytest.param(
            {"max_tokens": 5},
            SamplingParams(num_beams=5, max_tokens=5, min_tokens=5),
            id="a limit below the preset's",
        ),
        pytest.param(
            {"temperature": 0.5},
            SamplingParams(temperature=0.5, max_tokens=30, min_tokens=8),
            id="a temperature samples, without beams",
        ),
        pytest.param(
            {"num_beams": 3}, SamplingParams(num_beams=3, max_tokens=30, min_tokens=8), id="beams"
        ),
    ],
)
async def test_an_alias_applies_the_presets_parameters(
    client: httpx.AsyncClient,
    backend: FakeBackend,
    fields: dict[str, Any],
    expected: SamplingParams,
) -> None:
    response = await post(client, CHAT, chat(model="demo:caption", seed=0, **fields))

    assert response.status_code == 200, response.text
    assert backend.params == [expected]


def test_a_long_question_of_instructions_takes_no_time() -> None:
    question = "what? " + "please answer briefly. " * 200_000  # a minute, if each copied the rest
    assert without_instructions(question, VQA_INSTRUCTIONS) == "what?"


# -- alerts ----------------------------------------------------------------------------------------


def stage(name: str, healthy: str, target: str) -> list[dict[str, str]]:
    labels = f'application="blip2", deployment="{name}"'
    return [
        {
            "series": f'ray_serve_deployment_replica_healthy{{{labels}, replica="a"}}',
            "values": healthy,
        },
        {"series": f"ray_serve_autoscaling_target_replicas{{{labels}}}", "values": target},
        {"series": f"ray_serve_autoscaling_desired_replicas{{{labels}}}", "values": target},
    ]


@pytest.mark.parametrize("name", ["Preprocessor", "Encoder", "Generator"])
@pytest.mark.parametrize(
    ("healthy", "target"),
    [
        pytest.param("1x20 0x100", "1x20 0x100", id="stops at once"),
        pytest.param("1x18 0x102", "1x20 0x100", id="seen stopped before it was told to"),
        pytest.param("1x20 stale", "1x20 0x100", id="its series end"),
        pytest.param("3x20 0x100", "3x20 0x100", id="three replicas"),
        pytest.param("0x120", "0x120", id="never had any"),
        pytest.param("1x20 0x29 1x70", "1x20 0x20 1x79", id="is back after minutes"),
    ],
)
def test_no_alert_fires_for_a_stage_that_is_idle_at_zero(
    tmp_path: Path, name: str, healthy: str, target: str
) -> None:
    """After awesome-prometheus-alerts #277."""
    needs("promtool")
    always = [n for n in ("Ingress", "Preprocessor", "Encoder", "Generator") if n != name]
    series = stage(name, healthy, target)
    for other in always:
        series += stage(other, "1x120", "1x120")
    # The gauges of a generator go with it.
    built = healthy.replace("0x", "_x").replace("3x", "1x") if name == "Generator" else "1x120"
    series.append({"series": "ray_blip2_build_info", "values": built})
    checks = [
        {"expr": 'ALERTS{alertstate="firing"}', "eval_time": f"{minute}m", "exp_samples": []}
        for minute in range(1, 60)
    ]
    test = {"interval": "30s", "input_series": series, "promql_expr_test": checks}
    rules = write_rules(tmp_path / "rules.yaml")
    file = tmp_path / "test.yaml"
    file.write_text(
        yaml.safe_dump({"evaluation_interval": "30s", "rule_files": [rules.name], "tests": [test]})
    )
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
