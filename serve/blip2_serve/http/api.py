"""The HTTP application: OpenAI's routes, and those that tell about the server. No Ray, no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from blip2_serve import __version__
from blip2_serve.config import AppConfig
from blip2_serve.errors import InvalidRequest, Unavailable
from blip2_serve.http import openai
from blip2_serve.http.access import Access
from blip2_serve.http.body import HeadAsGet, QuickJson, RequestBody
from blip2_serve.http.captions import Captions
from blip2_serve.http.chat import image_of, prompt_of
from blip2_serve.http.errors import add_error_handlers, report_broken_stream
from blip2_serve.http.gate import Door, Gate
from blip2_serve.http.headers import SecureHeaders
from blip2_serve.http.measure import Measure
from blip2_serve.http.page import add_page
from blip2_serve.http.presets import default_prompt
from blip2_serve.http.responses import Responses
from blip2_serve.http.schema import ChatRequest, GenerateRequest
from blip2_serve.http.schema_answers import (
    ERRORS,
    ChatCompletion,
    Model,
    ModelList,
    State,
    Status,
    TextCompletion,
    responses,
)
from blip2_serve.http.schema_completions import CompletionRequest
from blip2_serve.http.service import Backend, ModelCall, Service
from blip2_serve.http.stream import TokenStreamResponse
from blip2_serve.observe.metrics import Recorder
from blip2_serve.observe.metrics_page import CONTENT_TYPE, MetricsPage
from blip2_serve.types import StageStatus

SCRAPE_TIMEOUT_S = 10.0  # Prometheus' default
NODES_SHARE = 0.5  # of it: nodes that are late are left out

LIMITATIONS = (
    "For research: BLIP-2's authors advise against deployment without first assessing safety and "
    "fairness in context. Answers can be biased and can describe what the image does not show."
)


def create_app(backend: Backend, config: AppConfig, recorder: Recorder) -> FastAPI:
    """The application of one ingress replica.

    Another API is one more class in a file of its own: it takes a `Service` and has a `router`.
    """
    app = FastAPIOffline(title="blip2-serve", version=__version__)
    app.add_middleware(Measure, recorder=recorder)
    app.add_middleware(RequestBody, max_bytes=config.ingress.max_body_bytes)
    app.add_middleware(HeadAsGet)
    add_error_handlers(app, recorder)
    service = Service(backend, config, recorder)
    own = config.ingress
    access = Access(own.access, backend.ingress_replicas)
    body_timeout_s = own.admission.body_timeout_s
    door = Door(access, service.admission, recorder, own.max_body_bytes, body_timeout_s)
    app.state.door, app.state.admission = door, service.admission
    app.state.request_timeout_s = config.request_timeout_s
    app.add_middleware(Gate, door=door)
    _outermost(app, SecureHeaders)
    for api in (Api(service), Responses(service), Captions(service)):
        app.include_router(api.router)
    add_page(app)
    if config.ingress.cors_origins:
        _allow_origins(app, config.ingress.cors_origins)
    return app


def _allow_origins(app: FastAPI, origins: Sequence[str]) -> None:
    """Lets web pages of these origins call the routes, and read the answer to a failure."""
    _outermost(
        app,
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "HEAD", "POST"],
        allow_headers=["*"],  # OpenAI's client alone sends a dozen of its own
        expose_headers=["x-request-id"],
    )


def _outermost(app: FastAPI, middleware: Callable[..., ASGIApp], **options: Any) -> None:
    """Adds middleware around all other, unlike `add_middleware`, also around what answers a bug."""
    build = app.build_middleware_stack

    def build_within() -> ASGIApp:
        return middleware(build(), **options)

    app.build_middleware_stack = build_within  # type: ignore[method-assign]


class Api:
    """OpenAI's routes, raw prompts, and the state of the server."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._metrics_page = MetricsPage()
        card = {
            "object": "model",
            "created": int(time.time()),
            "owned_by": "blip2-serve",
            "license": "MIT",
            "limitations": LIMITATIONS,
            "root": service.config.model_name,
        }
        self._model_cards = {
            name: {"id": name, **card, "preset": preset} for name, preset in service.names.items()
        }
        self.router = APIRouter(route_class=QuickJson)
        post, get = self.router.post, self.router.get
        chat, text = (responses(answer, stream=True) for answer in (ChatCompletion, TextCompletion))
        post("/v1/chat/completions", responses=chat)(self.chat_completions)
        post("/v1/completions", responses=text)(self.completions)
        post("/v1/generate", responses=text)(self.generate)
        get("/v1/models", responses=responses(ModelList))(self.models)
        get("/v1/models/{name:path}", responses=responses(Model))(self.model)
        get("/v1/status", responses=responses(Status))(self.status)
        get("/health", responses=responses(State))(self.health)
        get("/ready", responses=responses(State))(self.ready)
        page = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **ERRORS}
        get("/metrics", responses=page, response_class=Response)(self.metrics)

    async def chat_completions(self, request: ChatRequest) -> Response:
        """Answers a chat about one image, as OpenAI's chat completions do."""
        asked = self._service.asked(request)
        template = self._service.config.ingress.chat
        prompt = prompt_of(request.messages, template, preset=asked.preset, rewrite=asked.alias)
        image = await image_of(request.messages, self._service.images)
        names = {"image": "messages", "prompt": "messages", "max_tokens": request.limit_name}
        call = ModelCall(image, prompt, asked.params, names, asked.priority)
        return await self._answer(openai.ChatShape, request, call, asked.model)

    async def completions(self, request: CompletionRequest) -> Response:
        """Continues a raw prompt about an image; the same as `/v1/generate`, in OpenAI's form."""
        try:
            return await self.generate(request)
        except InvalidRequest as error:
            param = request.image_field if error.param == "image" else error.param
            raise error.about(param) from error

    async def generate(self, request: GenerateRequest) -> Response:
        """Continues a raw prompt about an image; answers as OpenAI's completions do."""
        asked = self._service.asked(request)
        image = await self._service.images.fetch(request.image, "image")
        prompt = default_prompt(asked.preset) if request.prompt is None else request.prompt
        call = ModelCall(image, prompt, asked.params, priority=asked.priority)
        return await self._answer(openai.TextShape, request, call, asked.model)

    async def _answer(
        self,
        shape: openai.Shape,
        request: ChatRequest | GenerateRequest,
        call: ModelCall,
        model: str,
    ) -> Response:
        token_ids = bool(request.return_token_ids)
        writer = openai.Writer(shape, model, return_token_ids=token_ids, include=request.included)
        if not request.stream:
            return JSONResponse(writer.body(await self._service.complete(call)))
        if "beams" in request.included:
            call = replace(call, params=replace(call.params, show_beams=True))
        tokens = await self._service.stream(call)
        report = partial(report_broken_stream, recorder=self._service.recorder)
        return TokenStreamResponse(tokens, writer.events(tokens, report, tokens.timing))

    async def models(self) -> Response:
        """Lists the served model: its own name first, then one for each preset."""
        return JSONResponse({"object": "list", "data": [*self._model_cards.values()]})

    async def model(self, name: str) -> Response:
        """Describes the served model by one of its names; any other name is a 404."""
        self._service.check_model(name)
        return JSONResponse(self._model_cards[name])

    async def status(self) -> Response:
        """What each stage is doing: its replicas, what waits in them, what they could do."""
        backend = self._service.backend
        stages, unready = await backend.status(), await backend.unready()
        body = {
            "object": "status",
            "model": self._service.config.model_name,
            "version": __version__,
            "ready": unready is None,
            "stages": [_stage(stage) for stage in stages],
        }
        return JSONResponse(body)

    async def health(self) -> Response:
        """Answers 200 while the process lives."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """Answers 200 while every stage answers, or is at zero replicas on purpose; else 503."""
        if reason := await self._service.backend.unready():
            raise Unavailable(f"not ready: {reason}")
        return JSONResponse({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        """Serves the metrics of all replicas on all nodes, for Prometheus."""
        urls = await self._service.backend.metrics_urls()
        page = await self._metrics_page.page(urls, NODES_SHARE * scrape_timeout_s(request))
        return Response(page, headers={"Content-Type": CONTENT_TYPE})


def _stage(stage: StageStatus) -> dict[str, Any]:
    return {
        "name": stage.name,
        "replicas": {
            "running": stage.running,
            "starting": stage.starting,
            "stopping": stage.stopping,
        },
        "waiting": stage.waiting,
        "rate_per_s": stage.rate_per_s,
        "capacity_per_s": stage.capacity_per_s,
    }


def scrape_timeout_s(request: Request) -> float:
    """How long Prometheus waits for the page: it says so in a header."""
    try:
        told = float(request.headers["x-prometheus-scrape-timeout-seconds"])
    except (KeyError, ValueError):
        return SCRAPE_TIMEOUT_S
    return min(SCRAPE_TIMEOUT_S, told)  # not the other way round: it may be NaN
