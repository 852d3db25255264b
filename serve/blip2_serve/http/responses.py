"""OpenAI's Responses API about one image. Nothing is stored."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from itertools import count
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from blip2_serve.errors import Blip2ServeError, InvalidRequest
from blip2_serve.http import schema_answers
from blip2_serve.http.body import QuickJson
from blip2_serve.http.chat import image_of, prompt_of
from blip2_serve.http.errors import report_broken_stream
from blip2_serve.http.openai import ChatShape, Json, Stripper, event_of
from blip2_serve.http.schema_responses import ResponsesRequest
from blip2_serve.http.service import Asked, ModelCall, Service
from blip2_serve.http.stream import TokenStreamResponse
from blip2_serve.types import Completion, FinishReason, TokenEvent, TokenLogprob


class Responses:
    """POST /v1/responses."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.router = APIRouter(route_class=QuickJson)
        answer = schema_answers.responses(schema_answers.Response, stream=True)
        self.router.post("/v1/responses", responses=answer)(self.create)

    async def create(self, request: ResponsesRequest) -> Response:
        """Answers a chat about one image, as OpenAI's Responses API does. Nothing is stored."""
        asked = self._service.asked(request)
        call = await self._call(request, asked)
        writer = Writer(request, asked)
        if not request.stream:
            return JSONResponse(writer.body(await self._service.complete(call)))
        tokens = await self._service.stream(call)
        report = partial(report_broken_stream, recorder=self._service.recorder)
        return TokenStreamResponse(tokens, writer.events(tokens, report))

    async def _call(self, request: ResponsesRequest, asked: Asked) -> ModelCall:
        messages, template = request.messages, self._service.config.ingress.chat
        try:
            prompt = prompt_of(messages, template, preset=asked.preset, rewrite=asked.alias)
            image = await image_of(messages, self._service.images)
        except InvalidRequest as error:
            raise error.about("input") from error
        names = {"image": "input", "prompt": "input", "max_tokens": request.limit_name}
        return ModelCall(image, prompt, asked.params, names, asked.priority)


class Writer:
    """Writes the response to one request: one message with one text."""

    def __init__(self, request: ResponsesRequest, asked: Asked) -> None:
        self._return_token_ids = bool(request.return_token_ids)
        self._message_id = f"msg_{uuid.uuid4().hex}"
        self._place = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        self._numbers = count()
        self._head: Json = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": asked.model,
            "background": False,
            "conversation": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": request.max_tool_calls,
            "metadata": request.metadata or {},
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": request.prompt_cache_key,
            "reasoning": {"effort": None, "summary": None},
            "safety_identifier": request.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": asked.params.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": [],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": asked.params.top_p,
            "truncation": "disabled",
            "user": request.user,
        }

    def body(self, completion: Completion) -> Json:
        """The response to a request without `stream`."""
        answer = completion.choices[0]
        part = self._part(answer.text.strip(), _logprobs(answer.logprobs), answer.token_ids)
        usage = _usage(completion.prompt_tokens, completion.completion_tokens)
        return self._ended(answer.finish_reason, part, usage)

    async def events(
        self,
        tokens: AsyncIterator[TokenEvent],
        report: Callable[[Exception], Blip2ServeError],
    ) -> AsyncIterator[bytes]:
        """The response to a request with `stream`: server-sent events, of which the last has it.

        An error can no longer set the status. The last event tells of it, as `report` makes it.
        """
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))
        item = self._message("in_progress")
        yield self._event("response.output_item.added", output_index=0, item=item)
        part = self._part("", [], ())
        yield self._event("response.content_part.added", **self._place, part=part)
        prompt_tokens, stripper, text = 0, Stripper(), ""
        token_ids: list[int] = []
        logprobs: list[Json] = []
        reason: FinishReason = "stop"
        try:
            async for event in tokens:
                prompt_tokens, reason = event.prompt_tokens, event.finish_reason or reason
                token_ids += event.token_ids
                delta, entries = stripper.push(event.text), _logprobs(event.logprobs)
                text += delta
                logprobs += entries
                if delta or entries or self._return_token_ids:
                    yield self._delta(delta, entries, event.token_ids)
        except Exception as error:
            failed = self._response("failed", error=_error(report(error)))
            yield self._event("response.failed", response=failed)
            return
        part = self._part(text, logprobs, token_ids)
        yield self._event("response.output_text.done", **self._place, text=text, logprobs=logprobs)
        yield self._event("response.content_part.done", **self._place, part=part)
        ended = self._ended(reason, part, _usage(prompt_tokens, len(token_ids)))
        yield self._event("response.output_item.done", output_index=0, item=ended["output"][0])
        yield self._event(f"response.{ended['status']}", response=ended)

    def _delta(self, text: str, logprobs: list[Json], token_ids: Sequence[int]) -> bytes:
        more = {"token_ids": token_ids} if self._return_token_ids else {}
        fields = {**self._place, "delta": text, "logprobs": logprobs, **more}
        return self._event("response.output_text.delta", **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": next(self._numbers), **fields}
        return b"event: " + kind.encode() + b"\n" + event_of(data)

    def _ended(self, reason: FinishReason, part: Json, usage: Json) -> Json:
        status = "incomplete" if reason == "length" else "completed"
        return self._response(status, output=[self._message(status, part)], usage=usage)

    def _response(
        self,
        status: str,
        *,
        output: Sequence[Json] = (),
        usage: Json | None = None,
        error: Json | None = None,
    ) -> Json:
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            **self._head,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": error,
            "incomplete_details": incomplete,
            "output": output,
            "usage": usage,
        }

    def _message(self, status: str, *content: Json) -> Json:
        return {
            "id": self._message_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _part(self, text: str, logprobs: list[Json], token_ids: Sequence[int]) -> Json:
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
        return {**part, "token_ids": token_ids} if self._return_token_ids else part


def _logprobs(logprobs: Sequence[TokenLogprob]) -> list[Json]:
    """As in a chat completion."""
    content: list[Json] = ChatShape.logprobs(logprobs, 0)["content"]
    return content


def _usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """Token counts; the image's positions count as input tokens."""
    return {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},  # not counted
        "output_tokens": completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _error(error: Blip2ServeError) -> Json:
    """OpenAI's codes of failed responses are others than those of its HTTP errors."""
    code = "invalid_prompt" if isinstance(error, InvalidRequest) else "server_error"
    return {"code": code, "message": error.message, "param": error.param, "type": error.type}
