"""What routes share, as used by an adapter for another API."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.responses import JSONResponse, Response

from blip2_serve.config import AppConfig
from blip2_serve.errors import ContextLengthExceeded, InvalidImage, ModelNotFound
from blip2_serve.http.errors import add_error_handlers
from blip2_serve.http.measure import Measure
from blip2_serve.http.service import ModelCall, Service
from blip2_serve.http.stream import TokenStream, TokenStreamResponse
from blip2_serve.observe import metrics
from blip2_serve.types import SamplingParams
from support.fake_backend import TEXT, TOKEN_IDS, FakeBackend, error_of
from support.recorder import FakeRecorder


class Adapter:
    """A route in the style of Ollama: images in plain base64, answers in lines of JSON."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.router = APIRouter()
        self.router.post("/api/generate")(self.generate)

    async def generate(self, request: dict[str, Any]) -> Response:
        self._service.check_model(request["model"])
        call = ModelCall(
            base64.b64decode(request["images"][0]),
            request["prompt"],
            SamplingParams(),
            {"image": "images", "max_tokens": "num_predict"},
        )
        if not request["stream"]:
            completion = await self._service.complete(call)
            return JSONResponse({"response": completion.choices[0].text})
        tokens = await self._service.stream(call)
        return TokenStreamResponse(tokens, self._lines(tokens), "application/x-ndjson")

    async def _lines(self, tokens: TokenStream) -> AsyncIterator[bytes]:
        async for event in tokens:
            yield json.dumps({"response": event.text, "done": event.last}).encode() + b"\n"


async def ask(
    backend: FakeBackend, recorder: FakeRecorder | None = None, **fields: Any
) -> httpx.Response:
    recorder = recorder or FakeRecorder()
    app = FastAPI()
    app.add_middleware(Measure, recorder=recorder)
    add_error_handlers(app, recorder)
    app.include_router(Adapter(Service(backend, AppConfig(), recorder)).router)
    image = base64.b64encode(b"picture").decode()
    body = {"model": "demo", "prompt": "a", "images": [image], "stream": False, **fields}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        return await client.post("/api/generate", json=body)


async def test_an_adapter_gets_whole_answers() -> None:
    backend = FakeBackend()
    response = await ask(backend)

    assert response.json() == {"response": f" picture:{TEXT}"}
    assert (backend.encoded, backend.prompts) == ([b"picture"], ["a"])


async def test_an_adapter_streams_in_its_own_format_and_is_measured() -> None:
    recorder = FakeRecorder()
    response = await ask(FakeBackend(), recorder, stream=True)

    lines = [json.loads(line) for line in response.text.splitlines()]
    assert response.headers["content-type"] == "application/x-ndjson"
    assert "".join(line["response"] for line in lines) == f" picture:{TEXT}"
    assert [line["done"] for line in lines] == [False] * (len(TOKEN_IDS) - 1) + [True]
    route = "/api/generate"
    assert len(recorder.observed[metrics.TIME_TO_FIRST_TOKEN.name, route]) == 1
    assert len(recorder.observed[metrics.INTER_TOKEN_LATENCY.name, route]) == len(TOKEN_IDS) - 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("backend", "param"),
    [
        pytest.param(
            lambda: FakeBackend(failures={b"picture": InvalidImage("broken")}), "images", id="image"
        ),
        pytest.param(
            lambda: FakeBackend(generation_failure=ContextLengthExceeded("long", "max_tokens")),
            "num_predict",
            id="max_tokens",
        ),
        pytest.param(
            lambda: FakeBackend(generation_failure=ContextLengthExceeded("long", "prompt")),
            "prompt",
            id="a field of the same name",
        ),
    ],
)
async def test_errors_name_the_fields_of_the_adapter(
    backend: Any, param: str, stream: bool
) -> None:
    response = await ask(backend(), stream=stream)

    assert response.status_code == 400
    assert error_of(response)["param"] == param


def test_only_the_served_model_and_no_model_pass_the_check() -> None:
    service = Service(FakeBackend(), AppConfig(), FakeRecorder())

    service.check_model("demo")
    service.check_model(None)
    for name in ("", "gpt-4o"):
        with pytest.raises(ModelNotFound, match="use 'demo'"):
            service.check_model(name)
