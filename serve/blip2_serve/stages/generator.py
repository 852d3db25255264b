"""GPU (or CPU) pool: image prefix and prompt to text. Thin: the work is the engine's."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import ray
import torch
import transformers
from ray import serve
from torch import Tensor

from blip2_serve import __version__
from blip2_serve.compute.assembly import EngineLimits, assemble
from blip2_serve.compute.base import Device
from blip2_serve.compute.devices import open_device
from blip2_serve.config import AppConfig
from blip2_serve.engine.engine import Engine
from blip2_serve.engine.loop import EngineLoop, Step
from blip2_serve.engine.sequence import Request
from blip2_serve.errors import ContextLengthExceeded, InvalidRequest
from blip2_serve.model.checkpoint import (
    eos_token_ids,
    longest_sequence,
    open_checkpoint,
    resolve_dtype,
    shortest_sequence,
)
from blip2_serve.model.decoder import OptDecoder
from blip2_serve.model.tokenizer import Tokenizer
from blip2_serve.observe import logs, metrics
from blip2_serve.observe.meter import EngineMeter
from blip2_serve.observe.recorder import RayRecorder, stage_seconds
from blip2_serve.stages.loading import (
    LoadReport,
    measured_loading,
    record_model,
    set_threads,
    size_of,
)
from blip2_serve.types import (
    Choice,
    Completion,
    ImageFeatures,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
)

STAGE = "generator"  # in metrics


@serve.deployment
class Generator:
    """Tokenises, submits to the engine, passes its events on, cancels, reports health."""

    async def __init__(self, config: AppConfig, device: str) -> None:  # type: ignore[misc]
        logs.configure(config.log_format)
        self._default_max_tokens = config.generator.default_max_tokens
        self._limit = config.generator.max_num_seqs
        self._device = open_device(device)
        self._recorder = RayRecorder()
        self._meter = EngineMeter(self._limit)
        # In a thread that ends: libgomp counts the threads of every one that ever computed, and
        # where they are more than the cores, it lets none of them spin.
        with ThreadPoolExecutor(1) as thread:
            parts = await asyncio.get_running_loop().run_in_executor(
                thread, _load, config, self._device
            )
        self._tokenizer, self._max_model_len, self._loading = parts[1:]
        self._loop = EngineLoop(
            parts[0],
            partial(set_threads, config.generator.threads),
            observe=self._observe,
            events_per_s=config.generator.stream_events_per_s,
        )
        self._build = _build_info(config, self._device.place, self._loading)
        self._recorder.report_by(self._report)
        self._meter.ready()

    async def generate(
        self, prefix: ImageFeatures, prompt: str, params: SamplingParams
    ) -> Completion:
        """The whole answers.

        Raises:
            InvalidRequest, ContextLengthExceeded, Overloaded, Unavailable
        """
        events = {e.index: e async for e in self._answers(prefix, prompt, params, whole=True)}
        return Completion(
            tuple(_choice(events[index]) for index in sorted(events)), events[0].prompt_tokens
        )

    async def stream(
        self, prefix: ImageFeatures, prompt: str, params: SamplingParams
    ) -> AsyncIterator[TokenEvent]:
        """The answers as they come; raises as `generate`, before the first event."""
        events = self._answers(prefix, prompt, params, whole=False)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def _answers(
        self, prefix: ImageFeatures, prompt: str, params: SamplingParams, *, whole: bool
    ) -> AsyncGenerator[TokenEvent, None]:
        least = self._tokenizer.least_tokens(prompt)
        if least >= self._max_model_len:  # tokenising megabytes would hold up the event loop
            raise ContextLengthExceeded(
                f"the prompt takes at least {least} tokens; this model has "
                f"{self._max_model_len} positions",
                "prompt",
            )
        ids = self._tokenizer.prompt_ids(prompt)
        params = self._bounded(len(ids), params)
        request = Request(uuid.uuid4().hex, ids, _tensor(prefix), prefix.digest, params)
        events = self._loop.stream(request, whole=whole)
        self._meter.arrived()
        tokens = 0
        with stage_seconds(self._recorder, STAGE):
            try:
                async for event in events:
                    tokens += len(event.token_ids)
                    yield replace(event, logprobs=tuple(map(self._with_bytes, event.logprobs)))
            except (asyncio.CancelledError, GeneratorExit):
                self._recorder.add(metrics.DROPPED, stage=STAGE)
                raise
            finally:
                self._meter.left(tokens * request.width // params.n)
                await events.aclose()

    async def stats(self) -> dict[str, Any]:
        """The engine's state, seconds of finished requests in it, and what loading cost."""
        return {
            **asdict(self._loop.stats()),
            "engine_seconds": self._loop.seconds,
            **self._loading.stats(),
        }

    def check_health(self) -> None:
        """Called by Serve: a replica whose engine has failed is replaced."""
        if self._loop.failure:
            raise RuntimeError(f"the engine has failed: {self._loop.failure}")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, for the autoscaling policy."""
        s = self._loop.stats()
        kv_share = min(s.kv_slots_used, s.kv_slots_needed) / s.kv_slots_total
        return self._meter.signals(s.running, s.waiting, kv_share).report()

    def _observe(self, step: Step) -> None:
        record, report = self._recorder, step.report
        self._meter.stepped(report.tokens, step.seconds)
        for seconds in step.queue_seconds:
            record.observe(metrics.QUEUE_TIME, seconds, stage=STAGE)
        for admission in report.admitted:
            record.add(metrics.PROMPT_TOKENS, admission.prompt_tokens)
            record.add(metrics.CACHED_PROMPT_TOKENS, admission.cached_tokens)
        record.observe(metrics.STEP_DURATION, step.seconds, phase=report.phase)
        record.observe(metrics.BATCH_SIZE, report.prefills + report.decodes, stage=STAGE)
        record.add(metrics.BATCH_CAPACITY, self._limit, stage=STAGE)
        record.add(metrics.GENERATED_TOKENS, step.answered)

    def _report(self) -> None:
        record, stats = self._recorder, self._loop.stats()
        record.set(metrics.QUEUE_DEPTH, stats.waiting, stage=STAGE)
        record.set(metrics.SEQUENCES_RUNNING, stats.running)
        record.set(metrics.KV_SLOTS_USED, stats.kv_slots_used)
        record.set(metrics.KV_SLOTS_CACHED, stats.kv_slots_cached)
        record.set(metrics.KV_SLOTS_CAPACITY, stats.kv_slots_total)
        record.set(metrics.BUILD_INFO, 1, **self._build)
        record_model(record, STAGE, self._loading, self._device.place)

    def _with_bytes(self, logprob: TokenLogprob) -> TokenLogprob:
        return replace(
            logprob,
            token=self._tokenizer.token_bytes(logprob.token_id),
            top=tuple(map(self._with_bytes, logprob.top)),
        )

    def _bounded(self, prompt_tokens: int, params: SamplingParams) -> SamplingParams:
        """The parameters with max_tokens set, checked against the model's positions."""
        room = self._max_model_len - prompt_tokens
        wanted = params.max_tokens
        if room < (wanted or 1):
            raise ContextLengthExceeded(
                f"image and prompt take {prompt_tokens} tokens, max_tokens asks for {wanted or 1}; "
                f"this model has {self._max_model_len} positions",
                "prompt" if room < 1 else "max_tokens",
            )
        max_tokens = wanted or min(self._default_max_tokens, room)
        if params.min_tokens > max_tokens:
            raise InvalidRequest(f"min_tokens is above max_tokens ({max_tokens})", "min_tokens")
        return replace(params, max_tokens=max_tokens)


def _build_info(config: AppConfig, device: torch.device, loading: LoadReport) -> dict[str, str]:
    return {
        "version": __version__,
        "model": config.model_name,
        "dtype": loading.dtype,
        "device": device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ray": ray.__version__,
    }


def _choice(event: TokenEvent) -> Choice:
    assert event.finish_reason is not None
    return Choice(event.token_ids, event.text, event.finish_reason, event.logprobs)


def _load(config: AppConfig, device: Device) -> tuple[Engine, Tokenizer, int, LoadReport]:
    """The engine, the tokenizer, the longest sequence in tokens, and what loading took."""
    own = config.generator
    set_threads(own.threads)
    device.check_quantize(own.quantize)
    checkpoint = open_checkpoint(config.model, config.revision)
    tokenizer = Tokenizer(checkpoint.folder, checkpoint.config)
    dtype = resolve_dtype(config.dtype, device.place, checkpoint.config)
    with measured_loading("language model") as report:
        decoder = OptDecoder.load(checkpoint, device.place, dtype)
        report.tensor_bytes = size_of(decoder)
        report.dtype = str(dtype).removeprefix("torch.")
        pad_to = device.prepare_decoder(decoder, own.quantize)
    max_len = longest_sequence(checkpoint.config, config.max_model_len)
    engine = assemble(
        decoder,
        device,
        EngineLimits(
            max_num_seqs=own.max_num_seqs,
            max_waiting=own.max_waiting,
            max_num_batched_tokens=own.max_num_batched_tokens,
            kv_slots=own.kv_slots,
            kv_memory_fraction=own.kv_memory_fraction,
            prefix_caching=own.prefix_caching,
        ),
        pad_to=pad_to,
        min_len=shortest_sequence(checkpoint.config),
        max_len=max_len,
        decode=tokenizer.decode,
        eos_token_ids=eos_token_ids(checkpoint.config),
    )
    return engine, tokenizer, max_len, report


def _tensor(prefix: ImageFeatures) -> Tensor:
    """[queries, hidden], on the CPU; the runner moves it."""
    flat = torch.frombuffer(bytearray(prefix.data), dtype=getattr(torch, prefix.dtype))
    return flat.view(prefix.shape)
