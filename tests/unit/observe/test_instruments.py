"""The instruments of stages: each event reaches the metrics, the scaling signals and the totals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from typing import Any

import pytest

from blip2_serve.engine.loop import Step
from blip2_serve.engine.scheduler import Admission
from blip2_serve.engine.sequence import Request
from blip2_serve.engine.step import EngineStats, StepReport
from blip2_serve.errors import TimedOut
from blip2_serve.observe import metrics
from blip2_serve.observe.instruments import (
    Batch,
    EncoderInstruments,
    GeneratorInstruments,
    Model,
    PreprocessorInstruments,
)
from blip2_serve.observe.loading import LoadReport
from blip2_serve.types import SamplingParams
from support.recorder import FakeRecorder

LOADING = LoadReport(tensor_bytes=1000, dtype="float32", seconds=2.0)
BUILD = dict.fromkeys(metrics.BUILD_INFO.labels, "x")
ENGINE = EngineStats(
    running=2,
    waiting=3,
    kv_slots_used=60,
    kv_slots_cached=10,
    kv_slots_total=100,
    kv_slots_needed=40,
    steps=7,
    cached_tokens=5,
)


@pytest.fixture
def recorder() -> FakeRecorder:
    return FakeRecorder()


def encoder(recorder: FakeRecorder, gpu: tuple[int, int] | None = None) -> EncoderInstruments:
    instruments = EncoderInstruments(recorder, max_batch_size=8)
    instruments.ready(Model(LOADING, lambda: gpu), lambda: 4)
    return instruments


def generator(recorder: FakeRecorder, engine: EngineStats = ENGINE) -> GeneratorInstruments:
    instruments = GeneratorInstruments(recorder, max_num_seqs=16)
    instruments.ready(Model(LOADING, lambda: None), lambda: engine, BUILD)
    return instruments


def request(**params: Any) -> Request:
    return Request("id", [1, 2], None, "digest", SamplingParams(max_tokens=8, **params))


def test_a_decoded_image_counts(recorder: FakeRecorder) -> None:
    instruments = PreprocessorInstruments(recorder, threads=2)
    instruments.ready()
    with instruments.image(5000):
        pass
    instruments.decoded(waited=0.5, seconds=0.1)

    assert recorder.observed["blip2_image_bytes",] == [5000]
    assert recorder.observed["blip2_queue_time_seconds", "preprocessor"] == [0.5]
    assert recorder.observed["blip2_image_decode_seconds",] == [0.1]
    assert len(recorder.observed["blip2_stage_duration_seconds", "preprocessor"]) == 1
    assert instruments.stats() == {
        "images": 1,
        "seconds": 0.1,
        "ongoing": 0,
        "waiting": 0,
        "per_s": 0,
    }
    assert instruments.signals().capacity == pytest.approx(2 / 0.1)


def test_images_beyond_the_threads_wait(recorder: FakeRecorder) -> None:
    instruments = PreprocessorInstruments(recorder, threads=2)
    instruments.ready()
    with instruments.image(1), instruments.image(1), instruments.image(1):
        recorder.report()
        assert instruments.signals().waiting == 1
    assert recorder.counted["blip2_queue_depth", "preprocessor"] == 1
    assert instruments.signals().waiting == 0


def test_an_image_whose_caller_leaves_is_dropped(recorder: FakeRecorder) -> None:
    instruments = PreprocessorInstruments(recorder, threads=2)
    instruments.ready()
    with pytest.raises(asyncio.CancelledError), instruments.image(1):
        raise asyncio.CancelledError
    assert recorder.counted["blip2_dropped_total", "preprocessor"] == 1
    assert instruments.signals().waiting == 0


def test_an_image_whose_time_is_over_has_expired(recorder: FakeRecorder) -> None:
    instruments = PreprocessorInstruments(recorder, threads=2)
    instruments.ready()
    with pytest.raises(TimedOut), instruments.image(1):
        raise TimedOut("late")
    assert recorder.counted["blip2_expired_total", "preprocessor"] == 1
    assert ("blip2_dropped_total", "preprocessor") not in recorder.counted


def test_a_batch_counts(recorder: FakeRecorder) -> None:
    instruments = encoder(recorder)
    instruments.batch(Batch(seconds=0.2, waited=(0.1, 0.3), dropped=1, expired=2))

    assert recorder.observed["blip2_queue_time_seconds", "encoder"] == [0.1, 0.3]
    assert recorder.observed["blip2_step_duration_seconds", "encode"] == [0.2]
    assert recorder.observed["blip2_batch_size", "encoder"] == [2]
    assert recorder.counted["blip2_batch_capacity_total", "encoder"] == 8
    assert recorder.counted["blip2_dropped_total", "encoder"] == 1
    assert recorder.counted["blip2_expired_total", "encoder"] == 2
    signals, stats = instruments.signals(), instruments.stats()
    assert (signals.finished, signals.waiting) == (2 / 0.5, 4)
    assert (stats["images"], stats["batches"], stats["seconds"]) == (2, 1, 0.2)
    assert (stats["tensor_bytes"], stats["load_seconds"]) == (1000, 2.0)


def test_the_state_of_an_encoder_on_a_gpu_is_reported(recorder: FakeRecorder) -> None:
    encoder(recorder, gpu=(30, 80))
    recorder.report()

    assert recorder.counted == {
        ("blip2_queue_depth", "encoder"): 4,
        ("blip2_model_load_seconds", "encoder"): 2.0,
        ("blip2_model_bytes", "encoder"): 1000,
        ("blip2_gpu_memory_used_bytes", "encoder"): 30,
        ("blip2_gpu_memory_capacity_bytes", "encoder"): 80,
    }


def test_a_step_counts(recorder: FakeRecorder) -> None:
    instruments = generator(recorder)
    admitted = (Admission("a", prompt_tokens=20, cached_tokens=5),)
    report = StepReport(prefills=1, decodes=2, tokens=17)
    instruments.step(Step(report, 0.05, admitted, queue_seconds=(0.4,), answered=3, expired=2))

    assert recorder.observed["blip2_queue_time_seconds", "generator"] == [0.4]
    assert recorder.observed["blip2_step_duration_seconds", "mixed"] == [0.05]
    assert recorder.observed["blip2_batch_size", "generator"] == [3]
    assert recorder.counted == {
        ("blip2_prompt_tokens_total",): 20,
        ("blip2_cached_prompt_tokens_total",): 5,
        ("blip2_batch_capacity_total", "generator"): 16,
        ("blip2_generated_tokens_total",): 3,
        ("blip2_expired_total", "generator"): 2,
    }
    signals = instruments.signals()
    assert signals.step_s == pytest.approx(0.05)
    assert signals.occupancy == 40 / 100  # a cached slot that no request holds is free
    assert signals.waiting == 3
    assert instruments.stats()["steps"] == 7


def test_a_call_that_only_launched_a_step_counts_what_it_admitted(recorder: FakeRecorder) -> None:
    admitted = (Admission("a", prompt_tokens=20, cached_tokens=5),)
    generator(recorder).step(Step(None, 0.001, admitted, queue_seconds=(0.4,), answered=0))

    assert [*recorder.observed] == [("blip2_queue_time_seconds", "generator")]
    assert recorder.counted["blip2_prompt_tokens_total",] == 20
    assert ("blip2_batch_capacity_total", "generator") not in recorder.counted


def test_the_state_of_a_generator_is_reported(recorder: FakeRecorder) -> None:
    generator(recorder)
    recorder.report()

    assert recorder.counted == {
        ("blip2_queue_depth", "generator"): 3,
        ("blip2_sequences_running",): 2,
        ("blip2_kv_slots_used",): 60,
        ("blip2_kv_slots_cached",): 10,
        ("blip2_kv_slots_capacity",): 100,
        ("blip2_build_info", *BUILD.values()): 1,
        ("blip2_model_load_seconds", "generator"): 2.0,
        ("blip2_model_bytes", "generator"): 1000,
    }


def test_the_seconds_of_requests_add_up_unless_they_were_cancelled(recorder: FakeRecorder) -> None:
    instruments = generator(recorder)
    seen = []
    for error in (None, ArithmeticError(), asyncio.CancelledError(), GeneratorExit()):
        with suppress(BaseException), instruments.request(request()) as count:
            count.tokens += 3
            if error:
                raise error
        seen.append(instruments.stats()["engine_seconds"])

    assert 0 < seen[0] < seen[1] == seen[2] == seen[3]
    assert len(recorder.observed["blip2_stage_duration_seconds", "generator"]) == 4
    assert recorder.counted["blip2_dropped_total", "generator"] == 2
    assert instruments.signals().finished == 4 / 0.5


def test_a_request_that_is_given_up_after_its_time_has_expired(recorder: FakeRecorder) -> None:
    instruments = generator(recorder)
    now = time.perf_counter()
    for expires in (now - 1, now + 60):
        late = replace(request(), expires=expires)
        with suppress(BaseException), instruments.request(late):
            raise asyncio.CancelledError
    assert recorder.counted["blip2_expired_total", "generator"] == 1
    assert recorder.counted["blip2_dropped_total", "generator"] == 1


def test_the_answer_tokens_of_requests_that_end_normally_are_observed(
    recorder: FakeRecorder,
) -> None:
    instruments = generator(recorder)
    with instruments.request(request(num_beams=4, n=2)) as count:
        count.tokens += 3
        count.tokens += 4
    for error in (ArithmeticError(), asyncio.CancelledError(), GeneratorExit()):
        with suppress(BaseException), instruments.request(request()) as count:
            count.tokens += 5
            raise error

    assert recorder.observed["blip2_request_generated_tokens",] == [7]


def test_beams_that_are_in_no_answer_count_for_the_capacity(recorder: FakeRecorder) -> None:
    """Four beams, one answer of 3 tokens: 12 tokens were generated."""
    idle = replace(ENGINE, running=0, waiting=0, kv_slots_used=0)
    instruments = generator(recorder, idle)
    with instruments.request(request(num_beams=4)) as count:
        count.tokens += 3
    for tokens in (2, 4, 4, 4):
        report = StepReport(prefills=0, decodes=tokens, tokens=tokens)
        instruments.step(Step(report, 0.1, (), (), answered=0))

    # Each of the 12 tokens takes a step of 0.1 s, which up to 16 sequences share.
    assert instruments.signals().capacity == pytest.approx(1 / (12 * 0.1 / 16), rel=0.01)


def _fail(*_: Any, **__: Any) -> None:
    raise ArithmeticError("not measured")


class BrokenRecorder(FakeRecorder):
    add = set = observe = _fail


BLOCKS: dict[str, Callable[[FakeRecorder], AbstractContextManager[object]]] = {
    "image": lambda recorder: PreprocessorInstruments(recorder, 1).image(1),
    "batch item": lambda recorder: encoder(recorder).in_stage(),
    "request": lambda recorder: generator(recorder).request(request()),
}
EVENTS: dict[str, Callable[[FakeRecorder], None]] = {
    "decoded": lambda recorder: PreprocessorInstruments(recorder, 1).decoded(0, 1),
    "batch": lambda recorder: encoder(recorder).batch(Batch(1, (0,), 0)),
    "step": lambda recorder: generator(recorder).step(Step(StepReport(0, 1, 1), 1, (), (), 1)),
}


@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS.keys())
def test_an_event_that_cannot_be_recorded_raises_nothing(
    event: Callable[[FakeRecorder], None],
) -> None:
    event(BrokenRecorder())


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())
def test_a_block_that_cannot_be_recorded_runs_all_the_same(
    block: Callable[[FakeRecorder], AbstractContextManager[object]],
) -> None:
    done = []
    with block(BrokenRecorder()):
        done.append(True)

    assert done


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())
def test_the_time_in_a_stage_is_measured_even_if_the_work_raises(
    block: Callable[[FakeRecorder], AbstractContextManager[object]], recorder: FakeRecorder
) -> None:
    with pytest.raises(ZeroDivisionError), block(recorder):
        raise ZeroDivisionError
    durations = [v for (name, *_), v in recorder.observed.items() if "stage_duration" in name]

    assert [len(values) for values in durations] == [1]
