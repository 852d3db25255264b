"""GPU (or CPU) pool: image features and prompt to text. Thin: the engine does the work."""

from __future__ import annotations

import asyncio
import sys
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray

from blip2_serve import machine
from blip2_serve.config import AppConfig
from blip2_serve.engine.loop import EngineLoop
from blip2_serve.engine.progress import is_stalled
from blip2_serve.engine.sequence import Request
from blip2_serve.errors import ContextLengthExceeded, InvalidRequest, WrongCheckpoint
from blip2_serve.observe import logs
from blip2_serve.observe.instruments import GeneratorInstruments
from blip2_serve.observe.recorder import RayRecorder
from blip2_serve.stages.deadline import expiry
from blip2_serve.stages.progress import Sent
from blip2_serve.stages.vital_signs import VitalSigns
from blip2_serve.types import (
    Call,
    Choice,
    Completion,
    ImageFeatures,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
    Vitals,
)

if TYPE_CHECKING:
    from blip2_serve.stages.language_model import LanguageModel

SWITCH_INTERVAL_S = 0.0002
MAX_WITHOUT_NUMBERS = 3  # requests in a row: then it is not the requests' fault


class Generator:
    """Tokenises, submits requests to the engine, returns its events, cancels, reports health."""

    async def __init__(self, config: AppConfig, device: str) -> None:  # type: ignore[misc]
        logs.configure(config.log_format)
        self._default_max_tokens = config.generator.default_max_tokens
        self._instruments = GeneratorInstruments(RayRecorder(), config.generator.max_num_seqs)
        # In a thread that ends: libgomp counts every living thread that ever computed, and if they
        # outnumber the cores, none of them spins.
        with ThreadPoolExecutor(1) as thread:
            loading = asyncio.get_running_loop().run_in_executor(thread, _load, config, device)
            self._model = model = await loading
        if model.device.asynchronous:
            # The engine's thread needs Python for a moment at each step, while the event loop is
            # busy with requests; it would wait for up to 5 ms, longer than the step.
            sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._loop = EngineLoop(
            model.engine,
            model.prepare_thread,
            observe=self._instruments.step,
            events_per_s=config.generator.stream_events_per_s,
            largest_step=config.generator.max_num_batched_tokens,
        )
        self._instruments.ready(
            model.loaded, self._loop.stats, {**model.build_info, "ray": ray.__version__}
        )
        self._signs = VitalSigns(self._instruments, model.fingerprint)

    async def generate(
        self,
        features: ImageFeatures,
        prompt: str,
        params: SamplingParams,
        *,
        call: Call | None = None,
    ) -> Completion:
        """Returns the whole answers.

        Raises:
            InvalidRequest, ContextLengthExceeded, Overloaded, TimedOut, Unavailable: also its
                WrongCheckpoint.
        """
        request = self._request(features, prompt, params, (), call)
        answers: dict[int, TokenEvent] = {}
        with self._instruments.request(request) as count:
            async with aclosing(self._loop.stream(request, whole=True)) as events:
                async for event in events:
                    count.tokens += len(event.token_ids)
                    answers[event.index] = self._with_bytes(event)
        return Completion(
            tuple(_choice(answers[index]) for index in sorted(answers)), answers[0].prompt_tokens
        )

    async def stream(
        self,
        features: ImageFeatures,
        prompt: str,
        params: SamplingParams,
        sent: Sent = (),
        *,
        call: Call | None = None,
    ) -> AsyncIterator[TokenEvent]:
        """Yields the answers as they come; raises as `generate`, if possible before any event.

        Args:
            features: Of the image.
            prompt: The text after it.
            params: How to answer.
            sent: Empty, or what another replica's streams had of each answer: its tokens, or None
                if it was whole. The events go on from there.
            call: Whose time it takes.
        """
        request = self._request(features, prompt, params, sent, call)
        with self._instruments.request(request) as count:
            async with aclosing(self._loop.stream(request)) as events:
                async for event in events:
                    count.tokens += len(event.token_ids)
                    yield self._with_bytes(event)

    async def alive(self, caller: str) -> Vitals:
        """Called by each ingress replica once per second, while it has work here.

        A replica that is not healthy is one that does not answer.
        """
        self.check_health()
        return self._signs.answer(caller)

    def check_health(self) -> None:
        """Called by Serve: a replica whose engine has failed, or got stuck, is replaced."""
        if self._loop.failure:
            raise RuntimeError(f"the engine has failed: {self._loop.failure}")
        if self._loop.without_numbers >= MAX_WITHOUT_NUMBERS:
            raise RuntimeError(
                f"the model computed no finite numbers for {self._loop.without_numbers} requests "
                "in a row"
            )
        stalled_s = self._loop.stalled_s
        if is_stalled(stalled_s, self._loop.usual_s):
            raise RuntimeError(f"the engine has made no progress for {stalled_s:.0f} s")

    async def stats(self) -> dict[str, Any]:
        return self._instruments.stats()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, for the autoscaling policy."""
        return self._instruments.signals().report()

    def _request(
        self,
        features: ImageFeatures,
        prompt: str,
        params: SamplingParams,
        sent: Sent,
        call: Call | None,
    ) -> Request:
        expires = expiry(call)
        self._instruments.called(call)
        if features.fingerprint not in ("", self._model.fingerprint):
            raise WrongCheckpoint("the image features come from another checkpoint")
        at_least = self._model.tokenizer.least_tokens(prompt)
        if at_least >= self._model.max_model_len:  # tokenising megabytes would block the event loop
            raise ContextLengthExceeded(
                f"the prompt takes at least {at_least} tokens; this model has "
                f"{self._model.max_model_len} positions",
                "prompt",
            )
        ids = self._model.tokenizer.prompt_ids(prompt)
        params = self._bounded(len(ids), params)
        image = self._model.tensor_of(features)
        name = uuid.uuid4().hex
        return Request(name, ids, image, features.digest, params, sent, expires)

    def _bounded(self, prompt_tokens: int, params: SamplingParams) -> SamplingParams:
        """Returns the parameters checked against the model, with max_tokens set.

        It is a limit: above what the prompt leaves of the model's positions, it is cut to that.
        """
        room = self._model.max_model_len - prompt_tokens
        if room < 1:
            raise ContextLengthExceeded(
                f"image and prompt take {prompt_tokens} tokens, which leaves none for an answer: "
                f"this model has {self._model.max_model_len} positions; shorten the prompt",
                "prompt",
            )
        max_tokens = min(params.max_tokens or self._default_max_tokens, room)
        if params.min_tokens > max_tokens:
            raise InvalidRequest(f"min_tokens is above max_tokens ({max_tokens})", "min_tokens")
        unknown = [i for i, _ in params.logit_bias if i >= self._model.tokenizer.vocabulary]
        if unknown:
            raise InvalidRequest(
                f"logit_bias has the token id {unknown[0]}; this model's ids are below "
                f"{self._model.tokenizer.vocabulary}",
                "logit_bias",
            )
        return replace(params, max_tokens=max_tokens)

    def _with_bytes(self, event: TokenEvent) -> TokenEvent:
        """Fills in the bytes of the tokens that log-probabilities are about."""
        if not event.logprobs:
            return event
        return replace(event, logprobs=tuple(map(self._logprob_with_bytes, event.logprobs)))

    def _logprob_with_bytes(self, logprob: TokenLogprob) -> TokenLogprob:
        return replace(
            logprob,
            token=self._model.tokenizer.token_bytes(logprob.token_id),
            top=tuple(map(self._logprob_with_bytes, logprob.top)),
        )


def _choice(event: TokenEvent) -> Choice:
    assert event.finish_reason is not None
    return Choice(event.token_ids, event.text, event.finish_reason, event.logprobs)


def _load(config: AppConfig, device: str) -> LanguageModel:
    # First: a replica that starts should not take the cores from those that serve.
    if device == "cpu":
        machine.give_way()
    from blip2_serve.stages.language_model import load

    return load(config, device)
