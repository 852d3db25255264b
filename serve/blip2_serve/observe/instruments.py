"""What each stage measures about itself, in one place.

A stage has one `Instruments` and reports events to it. They feed its metrics, its signals for the
autoscaling policy, and the totals of its `stats()`.

Measuring never raises into the work. Needs neither Ray nor torch.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from blip2_serve.engine.loop import Step
from blip2_serve.engine.sequence import Request
from blip2_serve.engine.step import EngineStats
from blip2_serve.errors import TimedOut
from blip2_serve.observe import metrics
from blip2_serve.observe.loading import LoadReport
from blip2_serve.observe.meter import BatchMeter, EngineMeter, Meter, RecentRate
from blip2_serve.observe.metrics import Recorder, harmless
from blip2_serve.scaling import Signals
from blip2_serve.types import Call


@dataclass(frozen=True)
class Batch:
    """A computed batch."""

    seconds: float
    waited: tuple[float, ...]  # seconds that each item waited for the batch to start
    dropped: int  # items skipped since the last batch because their callers had left
    expired: int = 0  # items skipped since the last batch because their time was over


@dataclass(frozen=True)
class Model:
    """What a replica holds of the model."""

    loading: LoadReport
    gpu_memory: Callable[[], tuple[int, int] | None]  # bytes used and in total; None for a CPU


@dataclass
class AnswerCount:
    """The tokens of a request's answers so far. The stage adds them as they come."""

    tokens: int = 0


class Instruments(ABC):
    """What the instruments of all stages share."""

    stage: ClassVar[str]  # the metrics' label
    _meter: Meter

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._rate = RecentRate()

    def called(self, call: Call | None) -> None:
        """Takes note of what a call tells besides its work."""
        if call:
            self._meter.refused += call.refused

    @contextmanager
    def in_stage(self) -> Iterator[None]:
        """Measures the block as one request's time in the stage, even if it raises."""
        entered = time.perf_counter()
        try:
            yield
        finally:
            self._left_stage(time.perf_counter() - entered)

    @abstractmethod
    def signals(self) -> Signals:
        """For the autoscaling policy. Call once per reporting interval."""

    @property
    def start_s(self) -> float | None:
        """Seconds from the start of the process until it could take requests; None before."""
        return self._meter.start_s

    @abstractmethod
    def capacity(self) -> float | None:
        """Requests (or images) per second that the replica can do; None until it is known."""

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """Totals since the start, and the state now."""

    @harmless
    def _left_stage(self, seconds: float) -> None:
        self._recorder.observe(metrics.STAGE_DURATION, seconds, stage=self.stage)

    @abstractmethod
    def _waiting(self) -> int:
        """Requests that wait in this replica."""

    @abstractmethod
    def _done(self) -> float:
        """Images, or tokens of answers, since the start."""

    def _report(self) -> None:
        """Records the state; called once per second."""
        self._rate.note(self._done())
        self._recorder.set(metrics.QUEUE_DEPTH, self._waiting(), stage=self.stage)

    def _report_model(self, model: Model) -> None:
        record, stage = self._recorder, self.stage
        record.set(metrics.MODEL_LOAD_SECONDS, model.loading.seconds, stage=stage)
        record.set(metrics.MODEL_BYTES, model.loading.tensor_bytes, stage=stage)
        if memory := model.gpu_memory():
            used, total = memory
            record.set(metrics.GPU_MEMORY_USED, used, stage=stage)
            record.set(metrics.GPU_MEMORY_CAPACITY, total, stage=stage)


class PreprocessorInstruments(Instruments):
    """Measures the decoding of images, `threads` at a time."""

    stage = "preprocessor"
    _meter: BatchMeter

    def __init__(self, recorder: Recorder, threads: int) -> None:
        super().__init__(recorder)
        self._threads = threads
        self._meter = BatchMeter(threads=threads)
        self._here = 0  # images waiting or being decoded

    def ready(self) -> None:
        """The replica can take requests now."""
        self._meter.ready()
        self._recorder.report_every_second(self._report)

    @contextmanager
    def image(self, size: int) -> Iterator[None]:
        """Measures the block as the time that an image file of `size` bytes is here."""
        self._image_arrived(size)
        self._here += 1
        try:
            with self.in_stage():
                yield
        except asyncio.CancelledError:
            self._image_dropped(metrics.DROPPED)
            raise
        except TimedOut:
            self._image_dropped(metrics.EXPIRED)
            raise
        finally:
            self._here -= 1

    @harmless
    def _image_dropped(self, kind: metrics.Counter) -> None:
        self._recorder.add(kind, stage=self.stage)

    @harmless
    def _image_arrived(self, size: int) -> None:
        self._recorder.observe(metrics.IMAGE_BYTES, size)

    @harmless
    def decoded(self, waited: float, seconds: float) -> None:
        """An image was decoded: seconds that it waited for a worker, and seconds in it."""
        self._meter.computed(1, seconds)
        self._recorder.observe(metrics.QUEUE_TIME, waited, stage=self.stage)
        self._recorder.observe(metrics.IMAGE_DECODE_TIME, seconds)

    def signals(self) -> Signals:
        return self._meter.signals(self._waiting())

    def capacity(self) -> float | None:
        return self._meter.capacity()

    def stats(self) -> dict[str, Any]:
        """Images since the start, the seconds that workers spent on them, and those here now."""
        return {
            "images": self._meter.items,
            "seconds": self._meter.seconds,
            "ongoing": self._here,
            "waiting": self._waiting(),
            "per_s": self._rate.per_s,
        }

    def _done(self) -> float:
        return self._meter.items

    def _waiting(self) -> int:
        return max(0, self._here - self._threads)


class EncoderInstruments(Instruments):
    """Measures batches of up to `max_batch_size` images."""

    stage = "encoder"
    _meter: BatchMeter

    def __init__(self, recorder: Recorder, max_batch_size: int) -> None:
        super().__init__(recorder)
        self._max_batch_size = max_batch_size
        self._meter = BatchMeter(max_batch_size)

    def ready(self, model: Model, waiting: Callable[[], int]) -> None:
        """The replica can take requests now; `waiting` tells how many images no batch has taken."""
        self._model = model
        self._images_waiting = waiting
        self._meter.ready()
        self._recorder.report_every_second(self._report)

    @harmless
    def batch(self, batch: Batch) -> None:
        """A batch was computed; called in the thread that computed it."""
        record, images = self._recorder, len(batch.waited)
        self._meter.computed(images, batch.seconds)
        for seconds in batch.waited:
            record.observe(metrics.QUEUE_TIME, seconds, stage=self.stage)
        record.observe(metrics.STEP_DURATION, batch.seconds, phase="encode")
        record.observe(metrics.BATCH_SIZE, images, stage=self.stage)
        record.add(metrics.BATCH_CAPACITY, self._max_batch_size, stage=self.stage)
        record.add(metrics.DROPPED, batch.dropped, stage=self.stage)
        record.add(metrics.EXPIRED, batch.expired, stage=self.stage)

    def signals(self) -> Signals:
        return self._meter.signals(self._waiting())

    def capacity(self) -> float | None:
        return self._meter.capacity()

    def stats(self) -> dict[str, Any]:
        """Images, batches and their seconds since the start, images waiting, cost of loading."""
        return {
            "images": self._meter.items,
            "batches": self._meter.batches,
            "seconds": self._meter.seconds,
            "waiting": self._waiting(),
            "per_s": self._rate.per_s,
            **self._model.loading.stats(),
        }

    def _done(self) -> float:
        return self._meter.items

    def _waiting(self) -> int:
        return self._images_waiting()

    def _report(self) -> None:
        super()._report()
        self._report_model(self._model)


class GeneratorInstruments(Instruments):
    """Measures requests and the steps, of up to `max_num_seqs` sequences, that they share."""

    stage = "generator"
    _meter: EngineMeter

    def __init__(self, recorder: Recorder, max_num_seqs: int) -> None:
        super().__init__(recorder)
        self._max_num_seqs = max_num_seqs
        self._meter = EngineMeter(max_num_seqs)
        self._request_seconds = 0.0  # summed over requests that were not cancelled
        self._answered = 0  # tokens

    def ready(self, model: Model, engine: Callable[[], EngineStats], build: dict[str, str]) -> None:
        """The replica can take requests now; `build` has the labels of BUILD_INFO."""
        self._model = model
        self._engine = engine
        self._build = build
        self._meter.ready()
        self._recorder.report_every_second(self._report)

    @contextmanager
    def request(self, request: Request) -> Iterator[AnswerCount]:
        """Measures the block as the answering of one request, even if it raises."""
        answers = AnswerCount()
        arrived = time.perf_counter()
        cancelled = False
        self._meter.arrived()
        try:
            with self.in_stage():
                yield answers
        except (asyncio.CancelledError, GeneratorExit):
            cancelled = True
            raise
        else:
            self._request_ended(answers.tokens)
        finally:
            # Beams beyond the n best, which are in no answer, took as many tokens each.
            tokens = answers.tokens * request.width // request.params.n
            now = time.perf_counter()
            expired = request.expires is not None and request.expires <= now
            self._request_left(tokens, now - arrived, cancelled, expired)

    @harmless
    def _request_ended(self, answer_tokens: int) -> None:
        self._recorder.observe(metrics.REQUEST_GENERATED_TOKENS, answer_tokens)

    @harmless
    def _request_left(self, tokens: int, seconds: float, cancelled: bool, expired: bool) -> None:
        self._meter.left(tokens)
        if cancelled:
            kind = metrics.EXPIRED if expired else metrics.DROPPED
            self._recorder.add(kind, stage=self.stage)
        else:
            self._request_seconds += seconds

    @harmless
    def step(self, step: Step) -> None:
        """The engine made a step; called in its thread."""
        record = self._recorder
        for seconds in step.queue_seconds:
            record.observe(metrics.QUEUE_TIME, seconds, stage=self.stage)
        for admission in step.admitted:
            record.add(metrics.PROMPT_TOKENS, admission.prompt_tokens)
            record.add(metrics.CACHED_PROMPT_TOKENS, admission.cached_tokens)
        record.add(metrics.GENERATED_TOKENS, step.answered)
        self._answered += step.answered
        record.add(metrics.EXPIRED, step.expired, stage=self.stage)
        if not (report := step.report):
            return
        self._meter.stepped(report.tokens, step.seconds)
        record.observe(metrics.STEP_DURATION, step.seconds, phase=report.phase)
        record.observe(metrics.BATCH_SIZE, report.prefills + report.decodes, stage=self.stage)
        record.add(metrics.BATCH_CAPACITY, self._max_num_seqs, stage=self.stage)

    def signals(self) -> Signals:
        return self._meter.signals(*self._load())

    def capacity(self) -> float | None:
        return self._meter.capacity(*self._load())

    def _load(self) -> tuple[int, int, float]:
        """Sequences running, requests waiting, and the share of the KV slots that is in use."""
        engine = self._engine()
        kv_share = min(engine.kv_slots_used, engine.kv_slots_needed) / engine.kv_slots_total
        return engine.running, engine.waiting, kv_share

    def stats(self) -> dict[str, Any]:
        """The engine's state, seconds of requests in the stage, and the cost of loading."""
        return {
            **asdict(self._engine()),
            "engine_seconds": self._request_seconds,
            "per_s": self._rate.per_s,
            **self._model.loading.stats(),
        }

    def _done(self) -> float:
        return self._answered

    def _waiting(self) -> int:
        return self._engine().waiting

    def _report(self) -> None:
        super()._report()
        record, engine = self._recorder, self._engine()
        record.set(metrics.SEQUENCES_RUNNING, engine.running)
        record.set(metrics.KV_SLOTS_USED, engine.kv_slots_used)
        record.set(metrics.KV_SLOTS_CACHED, engine.kv_slots_cached)
        record.set(metrics.KV_SLOTS_CAPACITY, engine.kv_slots_total)
        record.set(metrics.BUILD_INFO, 1, **self._build)
        self._report_model(self._model)
