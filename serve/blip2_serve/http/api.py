"""The HTTP routes: request in, backend called, OpenAI-shaped answer out. No Ray, no torch.

What computes the answers is behind `Backend`, so the routes can be tested with a fake one.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi_offline import FastAPIOffline
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from blip2_serve import __version__
from blip2_serve.concurrency import gather
from blip2_serve.config import AppConfig
from blip2_serve.errors import (
    Blip2ServeError,
    InvalidRequest,
    ModelNotFound,
    RequestTooLarge,
    Unavailable,
)
from blip2_serve.http import openai
from blip2_serve.http.body import QuickJson, RequestBody
from blip2_serve.http.chat import image_urls, prompt_of
from blip2_serve.http.images import ImageReader, is_data_url
from blip2_serve.http.measure import Measure, note_error, timed
from blip2_serve.http.schema import (
    MAX_IMAGES,
    CaptionFields,
    CaptionRequest,
    ChatRequest,
    GenerateRequest,
    GenerationFields,
)
from blip2_serve.http.validation import explain
from blip2_serve.observe.metrics import Recorder
from blip2_serve.observe.metrics_page import MetricsPage
from blip2_serve.types import Completion, ImageFeatures, SamplingParams, TokenEvent

LIMITATIONS = (
    "BLIP-2's authors: for research; not to be deployed without assessing safety and fairness in "
    "context. It can be biased and can state what is not in the image."
)


class Backend(Protocol):
    """What the routes need from the deployments behind them; errors are Blip2ServeErrors."""

    @property
    def is_ready(self) -> bool: ...

    async def prefix(self, image: bytes) -> ImageFeatures: ...

    async def generate(
        self, prefix: ImageFeatures, prompt: str, params: SamplingParams
    ) -> Completion: ...

    def stream(
        self, prefix: ImageFeatures, prompt: str, params: SamplingParams
    ) -> AsyncGenerator[TokenEvent, None]: ...

    async def metrics_urls(self) -> dict[str, str]:
        """Of each node, where its own metrics are."""


def create_app(backend: Backend, config: AppConfig, recorder: Recorder) -> FastAPI:
    """The application of one ingress replica."""

    def as_answer(error: Exception) -> Blip2ServeError:
        own = _as_own_error(error)
        note_error(recorder, own)
        return own

    async def answer_error(_: Request, error: Exception) -> Response:
        own = as_answer(error)
        headers = getattr(error, "headers", None)
        return JSONResponse(own.body(), status_code=own.status, headers=headers)

    app = FastAPIOffline(title="blip2-serve", version=__version__)
    app.router.route_class = QuickJson
    app.add_middleware(Measure, recorder=recorder)
    app.add_middleware(RequestBody, max_bytes=config.ingress.max_body_bytes)
    for kind in (Exception, Blip2ServeError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer_error)
    metrics_page = MetricsPage()
    images = ImageReader(config.ingress.images)
    started = int(time.time())

    @app.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest) -> Response:
        """OpenAI's chat completions; one image, in any user message."""
        check_model(request)
        params = request.sampling_params()
        prompt = prompt_of(request.messages, config.ingress.chat, short=request.preset == "vqa")
        data = await one_image(image_urls(request.messages))
        return await answer(openai.ChatShape, request, data, prompt, params)

    @app.post("/v1/generate")
    async def generate(request: GenerateRequest) -> Response:
        """A raw prompt about an image; answers as OpenAI's completions do."""
        check_model(request)
        params = request.sampling_params()
        data = await images.fetch(request.image, "image")
        return await answer(openai.TextShape, request, data, request.prompt or "", params)

    @app.post("/v1/caption", openapi_extra=_CAPTION_BODY)
    async def caption(request: Request) -> Response:
        """Captions of one or several images, by JSON or by upload; one result or error for each."""
        if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            fields, sources = await _read_form(request)
        else:
            fields, sources = await _read_caption_json(request)
        check_model(fields)
        params = fields.sampling_params()
        prompt = fields.prompt or ""

        async def caption_one(source: str | bytes) -> Completion | Blip2ServeError:
            try:
                if isinstance(source, bytes):
                    data = images.check(source, "image")
                else:
                    data = await images.fetch(source, "image")
                return await backend.generate(await prefix_of(data, "image"), prompt, params)
            except Blip2ServeError as error:
                return error

        results = await gather(map(caption_one, sources))
        errors = [r for r in results if isinstance(r, Blip2ServeError)]
        all_failed = len(errors) == len(results)
        for error in errors[all_failed:]:  # the first of them is the answer then
            note_error(recorder, error, answers=False)
        if all_failed:
            raise errors[0]
        return JSONResponse(_caption_list(config.model_name, results, fields))

    @app.get("/v1/models")
    async def models() -> Response:
        """The one model that is served."""
        return JSONResponse({"object": "list", "data": [model_card()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != config.model_name:
            raise _no_such_model(name, config.model_name)
        return JSONResponse(model_card())

    @app.get("/health")
    async def health() -> Response:
        """Answers while this process lives."""
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        """Answers 200 once a request has gone through every stage."""
        if not backend.is_ready:
            raise Unavailable("not ready: the stages are still loading or warming up")
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        """What all replicas on all nodes have measured, for Prometheus."""
        urls = await backend.metrics_urls()
        page, content_type = await metrics_page.page(urls, request.headers.get("accept", ""))
        return Response(page, headers={"Content-Type": content_type})

    def check_model(request: GenerationFields) -> None:
        if request.model is not None and request.model != config.model_name:
            raise _no_such_model(request.model, config.model_name)

    def model_card() -> openai.Json:
        return {
            "id": config.model_name,
            "object": "model",
            "created": started,
            "owned_by": "blip2-serve",
            "license": "MIT",
            "limitations": LIMITATIONS,
        }

    async def one_image(urls: list[str]) -> bytes:
        if not urls:
            raise InvalidRequest(
                "the chat has no image: one is needed, in a user message", "messages"
            )
        different = list(dict.fromkeys(urls))
        if len(different) > 1 and not all(map(is_data_url, different)):
            for url in different:
                images.check_url(url, "messages")
            # None is downloaded only to be refused.
            raise InvalidRequest(
                "the chat names several images; BLIP-2 answers about one: send one image, by the "
                "same URL each time",
                "messages",
            )
        data, *others = [await images.fetch(url, "messages") for url in different]
        if any(other != data for other in others):
            raise InvalidRequest(
                "the chat has different images; BLIP-2 answers about one", "messages"
            )
        return data

    async def prefix_of(data: bytes, param: str) -> ImageFeatures:
        try:
            return await backend.prefix(data)
        except InvalidRequest as error:
            # The stages do not know what the field is called.
            raise error.about(param) from error

    async def answer(
        shape: openai.Shape,
        request: ChatRequest | GenerateRequest,
        image: bytes,
        prompt: str,
        params: SamplingParams,
    ) -> Response:
        chat = isinstance(request, ChatRequest)
        prefix = await prefix_of(image, "messages" if chat else "image")
        head = {
            "id": f"{shape.id_prefix}{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": config.model_name,
        }
        if not request.stream:
            with _named_as_in(request):
                completion = await backend.generate(prefix, prompt, params)
            return JSONResponse(
                openai.body(shape, head, completion, bool(request.return_token_ids))
            )
        # The first event comes before the headers: an early failure is a status, not a broken 200.
        events = timed(backend.stream(prefix, prompt, params), recorder)
        with _named_as_in(request):
            first = await anext(events)
        return _Stream(
            events,
            openai.chunks(
                shape,
                head,
                _chain(first, events),
                return_token_ids=bool(request.return_token_ids),
                include_usage=request.include_usage,
                report=as_answer,
            ),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    return app


@contextmanager
def _named_as_in(request: GenerationFields) -> Iterator[None]:
    """The stages name fields by their own names; a chat has others."""
    try:
        yield
    except InvalidRequest as error:
        if isinstance(request, ChatRequest):
            names = {"prompt": "messages", "max_tokens": request.limit_name}
            raise error.about(names.get(error.param or "", error.param)) from error
        raise


class _Stream(StreamingResponse):
    """Closes the backend's stream however it ends; otherwise the garbage collector would, late."""

    def __init__(self, source: AsyncGenerator[TokenEvent, None], *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._source.aclose()


async def _chain(first: TokenEvent, rest: AsyncIterator[TokenEvent]) -> AsyncIterator[TokenEvent]:
    yield first
    async for event in rest:
        yield event


def _no_such_model(name: str, served: str) -> ModelNotFound:
    return ModelNotFound(f"no model {name!r} here; this server has {served!r}", "model")


# -- captions --------------------------------------------------------------------------------------

_CAPTION_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": CaptionRequest.model_json_schema()},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {
                        "image": {"type": "array", "items": {"type": "string", "format": "binary"}},
                        **CaptionFields.model_json_schema()["properties"],
                    },
                }
            },
        },
    }
}


async def _read_caption_json(request: Request) -> tuple[CaptionFields, list[str | bytes]]:
    body = await request.body()
    try:
        parsed = CaptionRequest.model_validate_json(body)
    except ValidationError as error:
        wrong_json = error.errors()[0]["type"] == "json_invalid"
        raise explain(error.errors(), None if wrong_json else from_json(body)) from None
    return parsed, list(parsed.urls)


async def _read_form(request: Request) -> tuple[CaptionFields, list[str | bytes]]:
    """Files are called "image", any number of them; every other field is a parameter."""
    async with request.form(max_files=MAX_IMAGES, max_fields=64) as form:
        sources: list[str | bytes] = []
        fields: dict[str, Any] = {}
        for name, value in form.multi_items():
            if name in ("image", "images"):
                sources.append(await value.read() if isinstance(value, UploadFile) else value)
            elif isinstance(value, UploadFile):
                raise InvalidRequest(f'{name}: files are sent as "image"', name)
            elif name == "stop":
                fields.setdefault(name, []).append(value)
            else:
                fields[name] = value
    if not sources:
        raise InvalidRequest('no file: send one or more as "image"', "image")
    try:
        return CaptionFields.model_validate(fields), sources
    except ValidationError as error:
        raise explain(error.errors(), fields) from None


def _caption_list(
    model: str, results: list[Completion | Blip2ServeError], fields: CaptionFields
) -> openai.Json:
    data: list[openai.Json] = []
    for index, result in enumerate(results):
        if isinstance(result, Blip2ServeError):
            data.append({"index": index, "error": result.details()})
            continue
        best = result.choices[0]
        item = {
            "index": index,
            "caption": best.text.strip(),
            "finish_reason": best.finish_reason,
        }
        if fields.return_token_ids:
            item["token_ids"] = best.token_ids
        if len(result.choices) > 1:
            item["captions"] = [choice.text.strip() for choice in result.choices]
        data.append(item)
    done = [r for r in results if isinstance(r, Completion)]
    return {
        "object": "caption.list",
        "model": model,
        "data": data,
        "usage": openai.usage(
            sum(c.prompt_tokens for c in done), sum(c.completion_tokens for c in done)
        ),
    }


# -- errors ----------------------------------------------------------------------------------------


def _as_own_error(error: Exception) -> Blip2ServeError:
    """Whatever was raised, as an error with a status and a message that is safe to show."""
    if isinstance(error, Blip2ServeError):
        return error
    if isinstance(error, RequestValidationError):
        return explain(error.errors(), error.body)
    if isinstance(error.__cause__, Blip2ServeError):  # FastAPI wraps what reading a body raises
        return error.__cause__
    if isinstance(error, HTTPException):
        own = RequestTooLarge if error.status_code == 413 else InvalidRequest
        translated: Blip2ServeError = own(str(error.detail))
        translated.status = error.status_code
        return translated
    return Blip2ServeError("internal error; the server's log has the details")
