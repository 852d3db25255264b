"""The captions route: one or several images by JSON or upload, a result or an error for each."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.datastructures import UploadFile

from blip2_serve.concurrency import gather
from blip2_serve.errors import Blip2ServeError, InvalidRequest
from blip2_serve.http.body import QuickJson, as_utf8
from blip2_serve.http.measure import note_error
from blip2_serve.http.openai import Json, usage
from blip2_serve.http.presets import default_prompt
from blip2_serve.http.schema import MAX_IMAGES, CaptionFields, CaptionRequest
from blip2_serve.http.schema_answers import CaptionList, responses
from blip2_serve.http.service import ModelCall, Service
from blip2_serve.http.validation import explain
from blip2_serve.types import Completion, SamplingParams

DOWNLOADS_AT_ONCE = 4  # of one request

_REQUEST_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {"schema": CaptionRequest.model_json_schema()},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image"],
                "properties": {
                    "image": {
                        "type": "array",
                        "items": {"type": "string", "format": "binary"},
                        "description": f"Image files, 1 to {MAX_IMAGES}.",
                    },
                    **CaptionFields.model_json_schema()["properties"],
                },
            }
        },
    },
}


class Captions:
    """POST /v1/caption."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.router = APIRouter(route_class=QuickJson)
        post = self.router.post
        body = {"requestBody": _REQUEST_BODY}
        post("/v1/caption", responses=responses(CaptionList), openapi_extra=body)(self.caption)

    async def caption(self, request: Request) -> Response:
        """Captions one or several images, sent as JSON or uploaded; one result or error for each.

        The request fails only if every image does, with the status of the first.
        """
        if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            fields, images = await _read_form(request)
        else:
            fields, images = await _read_json(request)
        asked = self._service.asked(fields)
        prompt = default_prompt(asked.preset) if fields.prompt is None else fields.prompt
        self._service.plan(asked.params, len(images), asked.priority)
        turns = asyncio.Semaphore(DOWNLOADS_AT_ONCE)
        results = await gather(
            self._caption(image, prompt, asked.params, turns) for image in images
        )
        errors = [result for result in results if isinstance(result, Blip2ServeError)]
        fatal = errors.pop(0) if len(errors) == len(results) else None
        for error in errors:
            note_error(self._service.recorder, error, answers=False)
        if fatal:
            raise fatal  # counted as the answer to the request
        return JSONResponse(_caption_list(asked.model, results, fields))

    async def _caption(
        self, image: str | bytes, prompt: str, params: SamplingParams, turns: asyncio.Semaphore
    ) -> Completion | Blip2ServeError:
        """`image`: a URL, or the bytes of an upload. `turns` limits the downloads of a request."""
        images = self._service.images
        try:
            if isinstance(image, str):
                async with turns:
                    image = await images.fetch(image, "image")
            else:
                images.check(image, "image")
            return await self._service.complete(ModelCall(image, prompt, params))
        except Blip2ServeError as error:
            return error


async def _read_json(request: Request) -> tuple[CaptionFields, list[str | bytes]]:
    body = as_utf8(await request.body())
    try:
        parsed = CaptionRequest.model_validate_json(body)
    except ValidationError as error:
        is_json = error.errors()[0]["type"] != "json_invalid"
        raise explain(error.errors(), from_json(body) if is_json else None) from None
    return parsed, list(parsed.urls)


async def _read_form(request: Request) -> tuple[CaptionFields, list[str | bytes]]:
    """Parts named "image" or "images" are files or URLs; every other part is a parameter."""
    async with request.form(max_files=MAX_IMAGES, max_fields=64) as form:
        images: list[str | bytes] = []
        fields: dict[str, Any] = {}
        for name, value in form.multi_items():
            if name in ("image", "images"):
                images.append(await value.read() if isinstance(value, UploadFile) else value)
            elif isinstance(value, UploadFile):
                raise InvalidRequest(f'{name} is a file; upload files under the name "image"', name)
            elif name == "stop":
                fields.setdefault(name, []).append(value)
            else:
                fields[name] = value
    if not images:
        raise InvalidRequest('no image; upload at least one file under the name "image"', "image")
    try:
        return CaptionFields.model_validate(fields), images
    except ValidationError as error:
        raise explain(error.errors(), fields) from None


def _caption_list(
    model: str, results: list[Completion | Blip2ServeError], fields: CaptionFields
) -> Json:
    completions = [result for result in results if isinstance(result, Completion)]
    return {
        "object": "caption.list",
        "model": model,
        "data": [
            {"index": index, **_item(result, return_token_ids=bool(fields.return_token_ids))}
            for index, result in enumerate(results)
        ],
        "usage": usage(
            sum(completion.prompt_tokens for completion in completions),
            sum(completion.completion_tokens for completion in completions),
        ),
    }


def _item(result: Completion | Blip2ServeError, *, return_token_ids: bool) -> Json:
    if isinstance(result, Blip2ServeError):
        return {"error": result.details()}
    best = result.choices[0]
    item: Json = {"caption": best.text.strip(), "finish_reason": best.finish_reason}
    if return_token_ids:
        item["token_ids"] = best.token_ids
    if len(result.choices) > 1:
        item["captions"] = [choice.text.strip() for choice in result.choices]
    return item
