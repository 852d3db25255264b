"""The Responses API over a fake backend; OpenAI's own types read whatever it answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai.types.responses import Response, ResponseOutputMessage, ResponseOutputText
from openai.types.responses import ResponseStreamEvent as StreamEvent
from pydantic import TypeAdapter
from starlette.types import Message, Scope

from blip2_serve.config import AppConfig
from blip2_serve.errors import (
    Blip2ServeError,
    ContextLengthExceeded,
    InvalidImage,
    Overloaded,
    Unavailable,
)
from blip2_serve.http.api import create_app
from blip2_serve.observe import metrics
from support.fake_backend import (
    PROMPT_TOKENS,
    TEXT,
    TOKEN_IDS,
    FakeBackend,
    client_of,
    error_of,
    post,
)
from support.images import data_url
from support.recorder import FakeRecorder

ROUTE = "/v1/responses"
ANSWER = f"picture:{TEXT}".strip()
EVENT = TypeAdapter[StreamEvent](StreamEvent)
LOGPROBS = "message.output_text.logprobs"


def image(content: bytes = b"picture", **more: Any) -> dict[str, Any]:
    return {"type": "input_image", "image_url": data_url(content), **more}


def text(text: str) -> dict[str, Any]:
    return {"type": "input_text", "text": text}


def says(role: str, *content: Any, **more: Any) -> dict[str, Any]:
    """An item; its content is a string if that is all there is."""
    whole = content[0] if len(content) == 1 and isinstance(content[0], str) else [*content]
    return {"role": role, "content": whole, **more}


ASKED = says("user", image(), text("what is it?"))


def asking(**more: Any) -> dict[str, Any]:
    return {"input": [ASKED], **more}


async def answered(client: httpx.AsyncClient, **more: Any) -> Response:
    response = await post(client, ROUTE, asking(**more))
    assert response.status_code == 200, response.text
    return Response.model_validate(response.json(), strict=False)


def message_of(response: Response) -> tuple[ResponseOutputMessage, ResponseOutputText]:
    """The one message of a response, and its one text."""
    (message,) = response.output
    assert isinstance(message, ResponseOutputMessage)
    (part,) = message.content
    assert isinstance(part, ResponseOutputText)
    return message, part


def read(response: httpx.Response) -> Iterator[Any]:
    """The events of a stream as OpenAI's types, with the names and numbers they came with."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *blocks, rest = response.text.split("\n\n")
    assert rest == ""
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        event = EVENT.validate_json(data.removeprefix("data: "))
        assert name == f"event: {event.type}"
        assert event.sequence_number == number
        yield event


async def streamed(client: httpx.AsyncClient, **more: Any) -> list[Any]:
    return [*read(await post(client, ROUTE, asking(stream=True, **more)))]


# -- whole responses -------------------------------------------------------------------------------


async def test_a_response_has_one_message_with_the_answer(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    response = await answered(client)
    message, part = message_of(response)

    assert backend.prompts == ["Question: what is it? Answer:"]
    assert response.id.startswith("resp_")
    assert (response.object, response.status, response.model) == ("response", "completed", "demo")
    assert (message.role, message.status) == ("assistant", "completed")
    assert message.id.startswith("msg_")
    assert (part.text, part.annotations, part.logprobs) == (ANSWER, [], [])
    assert response.output_text == ANSWER
    assert response.error is None
    assert response.incomplete_details is None
    assert response.completed_at is not None
    assert response.usage is not None
    assert response.usage.input_tokens == PROMPT_TOKENS
    assert response.usage.output_tokens == len(TOKEN_IDS)
    assert response.usage.total_tokens == PROMPT_TOKENS + len(TOKEN_IDS)


async def test_a_response_repeats_what_it_was_asked_for(client: httpx.AsyncClient) -> None:
    asked: dict[str, Any] = {
        "instructions": "Be brief.",
        "max_output_tokens": 7,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "tool_choice": "none",
        "temperature": 0.5,
        "top_p": 0.25,
        "user": "me",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
    }
    response = await answered(client, **asked)

    assert response.model_dump(include={*asked}) == asked


async def test_nothing_is_stored_whatever_was_asked_for(client: httpx.AsyncClient) -> None:
    for store in (True, False, None):
        body = (await post(client, ROUTE, asking(store=store))).json()

        assert body["store"] is False
        assert body["previous_response_id"] is None
        assert (await client.get(f"{ROUTE}/{body['id']}")).status_code == 404


async def test_an_answer_at_the_limit_is_incomplete(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.finish_reason = "length"
    whole = await answered(client, max_output_tokens=len(TOKEN_IDS))
    last = (await streamed(client, max_output_tokens=len(TOKEN_IDS)))[-1]

    assert last.type == "response.incomplete"
    for response in (whole, last.response):
        assert response.status == "incomplete"
        assert response.incomplete_details.reason == "max_output_tokens"
        assert message_of(response)[0].status == "incomplete"
        assert response.completed_at is None
    assert [params.max_tokens for params in backend.params] == [len(TOKEN_IDS)] * 2


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param({"include": [LOGPROBS], "top_logprobs": 2}, id="both"),
        pytest.param({"top_logprobs": 2}, id="by their number"),
    ],
)
async def test_log_probabilities_come_with_the_text(
    client: httpx.AsyncClient, asked: dict[str, Any]
) -> None:
    logprobs = message_of(await answered(client, **asked))[1].logprobs

    assert logprobs is not None
    assert "".join(entry.token for entry in logprobs).strip() == ANSWER
    assert all(len(entry.top_logprobs) == 2 for entry in logprobs)
    assert all(entry.logprob == -0.5 for entry in logprobs)


async def test_included_log_probabilities_have_no_others_beside_them_unless_asked_for(
    client: httpx.AsyncClient,
) -> None:
    logprobs = message_of(await answered(client, include=[LOGPROBS]))[1].logprobs

    assert logprobs is not None
    assert [entry.top_logprobs for entry in logprobs] == [[]] * len(TOKEN_IDS)


async def test_token_ids_come_on_request(client: httpx.AsyncClient) -> None:
    body = (await post(client, ROUTE, asking(return_token_ids=True))).json()
    events = await streamed(client, return_token_ids=True)

    assert body["output"][0]["content"][0]["token_ids"] == list(TOKEN_IDS)
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [i for delta in deltas for i in delta.token_ids] == list(TOKEN_IDS)


# -- input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "prompt"),
    [
        pytest.param([says("user", image())], "", id="an image alone asks for a caption"),
        pytest.param(
            [says("user", image(), text("Q1"), type="message")],
            "Question: Q1 Answer:",
            id="an item with its type",
        ),
        pytest.param(
            [says("user", image()), says("user", "Q1")],
            "Question: Q1 Answer:",
            id="an image, then a question as a string",
        ),
        pytest.param(
            [says("user", image(), text("Q1")), says("assistant", "A1"), says("user", "Q2")],
            "Question: Q1 Answer: A1. Question: Q2 Answer:",
            id="an earlier answer as a string",
        ),
        pytest.param(
            [
                says("user", image(), text("Q1")),
                {"type": "reasoning", "id": "rs_1", "summary": []},
                says(
                    "assistant",
                    {"type": "output_text", "text": "A1", "annotations": [], "logprobs": []},
                    id="msg_1",
                    type="message",
                    status="completed",
                ),
                says("user", text("Q2")),
            ],
            "Question: Q1 Answer: A1. Question: Q2 Answer:",
            id="an earlier answer as it was received",
        ),
        pytest.param(
            [says("system", "S"), says("developer", text("D")), says("user", image(), text("Q1"))],
            "S D Question: Q1 Answer:",
            id="system and developer messages",
        ),
        pytest.param(
            [says("user", image(detail=None, prompt_cache_breakpoint=None), text("Q1"))],
            "Question: Q1 Answer:",
            id="null is not given",
        ),
        pytest.param(
            [
                says(
                    "user",
                    {"type": "input_image", "image_url": {"url": data_url(b"picture")}},
                    text("Q1"),
                )
            ],
            "Question: Q1 Answer:",
            id="the image as in a chat completion",
        ),
    ],
)
async def test_the_input_becomes_the_prompt(
    client: httpx.AsyncClient, backend: FakeBackend, items: list[Any], prompt: str
) -> None:
    response = await post(client, ROUTE, {"input": items})

    assert response.status_code == 200, response.text
    assert backend.prompts == [prompt]
    assert backend.encoded == [b"picture"]


async def test_instructions_come_before_all_messages(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    items = [says("system", "S"), ASKED]
    await post(client, ROUTE, {"input": items, "instructions": "I"})

    assert backend.prompts == ["I S Question: what is it? Answer:"]


async def test_an_alias_of_the_model_rewrites_the_input(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    question = "what is it? Answer the question using a single word or phrase."
    body = {"input": [says("user", image(), text(question))], "instructions": "I"}
    vqa = await post(client, ROUTE, {**body, "model": "demo:vqa"})
    caption = await post(client, ROUTE, {**body, "model": "demo:caption", "max_output_tokens": 99})

    assert [vqa.json()["model"], caption.json()["model"]] == ["demo:vqa", "demo:caption"]
    assert backend.prompts == ["Question: what is it? Short answer:", "a photo of"]
    assert [params.max_tokens for params in backend.params] == [10, 30]


async def test_a_conversation_can_go_on_with_the_output_of_a_response(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    first = await answered(client, include=[LOGPROBS], return_token_ids=True)
    output = [item.model_dump() for item in first.output]
    again = await post(client, ROUTE, {"input": [ASKED, *output, says("user", "and now?")]})

    assert again.status_code == 200, again.text
    assert backend.prompts[1] == (
        f"Question: what is it? Answer: {ANSWER}. Question: and now? Answer:"
    )


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        pytest.param({}, "input", "required", id="no input"),
        pytest.param({"input": "hello"}, "input", "no image", id="a text without an image"),
        pytest.param({"input": []}, "input", "user", id="no items"),
        pytest.param(
            {"input": [ASKED, says("assistant", "A1"), {"type": "reasoning", "id": "r"}]},
            "input",
            "input[1]: the last message",
            id="an answer last",
        ),
        pytest.param({"input": [3]}, "input", "role", id="an item that is no object"),
        pytest.param({"input": [says("robot", "x")]}, "input", "role", id="an unknown role"),
        pytest.param(
            {"input": [says("user", image(b"a"), image(b"b"))]},
            "input",
            "different images",
            id="two images",
        ),
        pytest.param(
            {"input": [says("system", image())]}, "input", "role user", id="an image of the system"
        ),
        pytest.param(
            {"input": [says("user", {"type": "input_file", "file_id": "f"})]},
            "input",
            "input_file",
            id="a file",
        ),
        pytest.param(
            {"input": [says("user", {"type": "input_image", "file_id": "f"})]},
            "input",
            "file_id: no files are stored",
            id="a stored image",
        ),
        pytest.param(
            {"input": [says("user", {"type": "input_image", "image_url": "ftp://x"})]},
            "input",
            "data URL",
            id="an URL of another kind",
        ),
        pytest.param(
            {"input": [{"type": "item_reference", "id": "msg_1"}]},
            "input",
            "nothing is stored",
            id="a stored item",
        ),
        pytest.param(
            {"input": [{"type": "function_call_output", "call_id": "c", "output": "o"}]},
            "input",
            "function_call_output",
            id="the output of a tool",
        ),
        pytest.param(
            asking(previous_response_id="resp_1"),
            "previous_response_id",
            "nothing is stored",
            id="an earlier response",
        ),
        pytest.param(
            asking(conversation="conv_1"), "conversation", "nothing is stored", id="a conversation"
        ),
        pytest.param(
            asking(conversation={"id": "conv_1"}),
            "conversation",
            "nothing is stored",
            id="a conversation as an object",
        ),
        pytest.param(asking(prompt={"id": "p"}), "prompt", "stored", id="a stored prompt"),
        pytest.param(asking(background=True), "background", "background", id="background"),
        pytest.param(
            asking(tools=[{"type": "web_search"}]), "tools", "cannot call tools", id="tools"
        ),
        pytest.param(
            asking(tool_choice="required"), "tool_choice", "cannot call tools", id="a needed tool"
        ),
        pytest.param(
            asking(text={"format": {"type": "json_schema", "name": "n", "schema": {}}}),
            "text",
            "schema",
            id="a JSON schema",
        ),
        pytest.param(
            asking(text={"format": {"type": "json_object"}}), "text", "JSON", id="a JSON object"
        ),
        pytest.param(
            asking(context_management=[{"type": "compaction"}]),
            "context_management",
            "compacted",
            id="compaction",
        ),
        pytest.param(asking(max_tokens=3), "max_tokens", "max_output_tokens", id="max_tokens"),
        pytest.param(asking(n=2), "n", "one answer", id="two answers"),
        pytest.param(asking(max_output_tokens=0), "max_output_tokens", "1", id="no tokens"),
        pytest.param(
            asking(min_tokens=9, max_output_tokens=8),
            "min_tokens",
            "max_output_tokens (8)",
            id="minimum above the limit",
        ),
        pytest.param(asking(top_logprobs=21), "top_logprobs", "20", id="too many logprobs"),
        pytest.param(asking(tempreature=1), "tempreature", "unknown", id="a name that is nobody's"),
    ],
)
async def test_a_bad_request_is_a_400_that_names_the_field_and_says_why(
    client: httpx.AsyncClient, body: dict[str, Any], param: str, words: str
) -> None:
    for stream in (False, True):
        response = await post(client, ROUTE, {**body, "stream": stream})

        error = error_of(response)
        assert response.status_code == 400
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert words in error["message"]


async def test_an_unknown_model_is_a_404(client: httpx.AsyncClient) -> None:
    response = await post(client, ROUTE, asking(model="gpt-5"))

    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"


async def test_parameters_without_effect_are_accepted(client: httpx.AsyncClient) -> None:
    await answered(
        client,
        store=True,
        truncation="auto",
        service_tier="flex",
        tools=[],
        tool_choice="auto",
        parallel_tool_calls=True,
        reasoning={"effort": "low", "summary": "auto"},
        text={"format": {"type": "text"}, "verbosity": "low"},
        include=["reasoning.encrypted_content"],
        max_tool_calls=3,
        background=False,
        metadata={},
        prompt_cache_retention="24h",
    )


async def test_null_means_not_given_for_every_parameter(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    names = client._transport.app.openapi()["components"]["schemas"]["ResponsesRequest"]  # type: ignore[attr-defined]
    nothing = {name: None for name in names["properties"] if name != "input"}
    await answered(client, seed=1)
    await answered(client, **{**nothing, "seed": 1})

    assert len(nothing) > 40
    assert backend.params[0] == backend.params[1]


@pytest.mark.parametrize(
    ("failure", "param"),
    [
        pytest.param(InvalidImage("not an image", "image"), "input", id="the image"),
        pytest.param(ContextLengthExceeded("too long", "prompt"), "input", id="the prompt"),
        pytest.param(
            ContextLengthExceeded("too long", "max_tokens"), "max_output_tokens", id="the limit"
        ),
    ],
)
async def test_a_failure_in_the_backend_names_the_requests_own_field(
    client: httpx.AsyncClient, backend: FakeBackend, failure: Blip2ServeError, param: str
) -> None:
    backend.generation_failure = failure
    for stream in (False, True):
        response = await post(client, ROUTE, asking(stream=stream))

        assert response.status_code == 400
        assert error_of(response)["param"] == param


# -- streams ---------------------------------------------------------------------------------------


async def test_a_stream_has_openais_events_in_order(client: httpx.AsyncClient) -> None:
    events = await streamed(client)
    deltas = [event for event in events if event.type == "response.output_text.delta"]

    assert len(deltas) > 3
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    created, in_progress, item, part, *_, done, part_done, item_done, completed = events
    assert created.response.status == in_progress.response.status == "in_progress"
    assert created.response.output == []
    assert created.response.id == in_progress.response.id == completed.response.id
    assert (item.item.status, item.item.content) == ("in_progress", [])
    assert part.part.text == ""
    assert {event.item_id for event in (part, *deltas, done, part_done)} == {item.item.id}
    places = {(event.output_index, event.content_index) for event in (part, *deltas, done)}
    assert places == {(0, 0)}
    assert item_done.item == completed.response.output[0]
    assert part_done.part == item_done.item.content[0]
    assert completed.response.completed_at is not None


async def test_the_deltas_add_up_to_the_whole_response(client: httpx.AsyncClient) -> None:
    asked: dict[str, Any] = {"include": [LOGPROBS], "top_logprobs": 2}
    whole = await answered(client, **asked)
    events = await streamed(client, **asked)
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    (done,) = (event for event in events if event.type == "response.output_text.done")

    _, part = message_of(whole)
    assert "".join(event.delta for event in deltas) == done.text == part.text
    assert part.logprobs is not None
    expected = [(entry.token, entry.logprob) for entry in part.logprobs]
    for logprobs in ([e for event in deltas for e in event.logprobs], done.logprobs):
        assert [(entry.token, entry.logprob) for entry in logprobs] == expected
    assert message_of(events[-1].response)[1] == part
    assert events[-1].response.usage == whole.usage


@pytest.mark.parametrize("failure", [Overloaded("try again later"), ContextLengthExceeded("long")])
async def test_an_error_before_the_first_token_sets_the_status(
    client: httpx.AsyncClient, backend: FakeBackend, failure: Blip2ServeError
) -> None:
    backend.generation_failure = failure
    for stream in (False, True):
        response = await post(client, ROUTE, asking(stream=stream))

        assert response.status_code == failure.status
        assert error_of(response) == failure.body()["error"]


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        pytest.param(Unavailable("lost"), "server_error", "lost", id="a lost replica"),
        pytest.param(ContextLengthExceeded("long"), "invalid_prompt", "long", id="no room"),
        pytest.param(KeyError("secret"), "server_error", "internal error", id="a bug"),
    ],
)
async def test_an_error_during_a_stream_is_a_failed_response(
    client: httpx.AsyncClient,
    backend: FakeBackend,
    failure: Exception,
    code: str,
    message: str,
) -> None:
    backend.stream_fails_after, backend.stream_failure = 3, failure
    *_, delta, last = await streamed(client)

    assert delta.type == "response.output_text.delta"
    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert last.response.error.code == code
    assert last.response.error.message.startswith(message)
    assert "secret" not in last.response.error.message


async def test_generation_stops_when_the_client_disconnects() -> None:
    backend = FakeBackend(endless=True)
    started = asyncio.Event()
    unread = [{"type": "http.request", "body": json.dumps(asking(stream=True)).encode()}]
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": ROUTE,
        "raw_path": ROUTE.encode(),
        "query_string": b"",
        "headers": [],
        "server": ("test", 80),
        "scheme": "http",
    }

    async def receive() -> Message:
        if unread:
            return unread.pop()
        await started.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            started.set()
        await asyncio.sleep(0)  # lets the disconnect be received, as a socket would

    async with asyncio.timeout(5):
        await create_app(backend, AppConfig(), FakeRecorder())(scope, receive, send)
        await backend.stream_closed.wait()


async def test_responses_are_counted_and_timed_by_their_route(backend: FakeBackend) -> None:
    recorder = FakeRecorder()
    async with client_of(backend, recorder=recorder) as client:
        await post(client, ROUTE, asking())
        await post(client, ROUTE, asking(stream=True))
        await post(client, ROUTE, asking(n=2))
        backend.stream_fails_after = 3
        await post(client, ROUTE, asking(stream=True))

    counted = {key[1:]: n for key, n in recorder.counted.items() if key[0] == metrics.REQUESTS.name}
    assert counted == {(ROUTE, "ok"): 2, (ROUTE, "invalid"): 1, (ROUTE, "unavailable"): 1}
    assert len(recorder.observed[metrics.TIME_TO_FIRST_TOKEN.name, ROUTE]) == 2


@pytest.mark.parametrize("name", ["include_timing", "include_beams", "include_events"])
async def test_what_only_chunks_can_tell_is_refused_by_name(
    client: httpx.AsyncClient, name: str
) -> None:
    answer = await post(client, ROUTE, asking(stream=True, stream_options={name: True}))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "stream_options"
    assert name in answer.json()["error"]["message"]
