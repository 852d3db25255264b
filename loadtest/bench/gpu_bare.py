"""For `gpu_app.py`: the same work in two bare processes, the least that serving could take.

One encodes whatever waits, the other runs the engine, and queues join them and the parent, as in
the server: a GPU's worth of work without Ray, HTTP, JSON or the decoding of JPEGs.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from blip2_serve.compute.assembly import EngineLimits, assemble
from blip2_serve.compute.base import set_threads
from blip2_serve.compute.devices import open_device
from blip2_serve.config import AppConfig
from blip2_serve.engine.engine import Engine
from blip2_serve.engine.sequence import Request
from blip2_serve.model.checkpoint import (
    eos_token_ids,
    longest_sequence,
    open_checkpoint,
    resolve_dtype,
    shortest_sequence,
)
from blip2_serve.model.decoder import OptDecoder
from blip2_serve.model.processor import ImageProcessor
from blip2_serve.model.tokenizer import Tokenizer
from blip2_serve.model.vision import ImageEncoder
from blip2_serve.types import SamplingParams
from loadtest.bench.client import Answer, Window
from loadtest.bench.gpu_server import CpuSeconds

READY_WITHIN_S, ANSWER_WITHIN_S, POLL_S = 200, 60, 1.0

READY = "ready"


class BareFailed(Exception):
    """One of the two processes has ended, or was too slow."""


@dataclass(frozen=True)
class Answered:
    """A finished answer; `request` is the number that the parent gave it."""

    request: int
    token_ids: tuple[int, ...]
    text: str


# -- the two processes -----------------------------------------------------------------------------


def encode(config: AppConfig, pixels_file: Path, inbox: Any, features: Any, results: Any) -> None:
    """Takes (request, picture) from `inbox`; puts (request, features as bytes) into `features`.

    As the encoder stage does, but the pixels, uint8 [pictures, 3, S, S], are here already.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent ends this process
    pictures = np.load(pixels_file)
    device = open_device(config.device)
    set_threads(config.encoder.threads)
    checkpoint = open_checkpoint(config.model)
    dtype = resolve_dtype(config.dtype, device.place, checkpoint.config)
    encoder = ImageEncoder.load(
        checkpoint, ImageProcessor.load(checkpoint.folder), device.place, dtype
    )
    limit = config.encoder.max_batch_size
    run = device.prepare_encoder(encoder, limit)
    results.put(READY)
    while True:
        waiting: list[tuple[int, int]] = [inbox.get()]
        with contextlib.suppress(queue.Empty):
            while len(waiting) < limit:
                waiting.append(inbox.get_nowait())
        batch = device.host_tensor((len(waiting), *pictures.shape[1:]), torch.uint8)
        np.stack([pictures[picture] for _, picture in waiting], out=batch.numpy())
        rows = device.download(run(batch)).view(torch.uint8).numpy()
        for (request, _), row in zip(waiting, rows, strict=True):
            features.put((request, row.tobytes()))


def generate(config: AppConfig, tokens: int, features: Any, results: Any) -> None:
    """Takes (request, features) and puts an `Answered` with so many tokens into `results`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    engine, prompt, shape, dtype = _load(config)
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    inbox: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()

    def receive() -> None:
        while True:
            inbox.put(features.get())

    threading.Thread(target=receive, daemon=True).start()
    answers: dict[str, tuple[list[int], list[str]]] = {}
    results.put(READY)
    while True:
        while not engine.has_work or not inbox.empty():
            request, data = inbox.get()
            image = torch.frombuffer(bytearray(data), dtype=dtype).view(shape)
            name = str(request)
            answers[name] = [], []
            engine.add(Request(name, prompt, image, digest=name, params=params))
        for name, event in engine.step().events:
            ids, texts = answers[name]
            ids += event.token_ids
            texts.append(event.text)
            if event.last:
                del answers[name]
                results.put(Answered(int(name), tuple(ids), "".join(texts).strip()))


def _load(config: AppConfig) -> tuple[Engine, list[int], tuple[int, int], torch.dtype]:
    """The generator's engine, a caption's prompt, and shape and dtype of an image's features."""
    own = config.generator
    device = open_device(config.device)
    set_threads(own.threads)
    checkpoint = open_checkpoint(config.model)
    model = checkpoint.config
    tokenizer = Tokenizer(checkpoint.folder, model)
    dtype = resolve_dtype(config.dtype, device.place, model)
    decoder = OptDecoder.load(checkpoint, device.place, dtype)
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
        pad_to=device.prepare_decoder(decoder, own.quantize),
        min_len=shortest_sequence(model),
        max_len=longest_sequence(model, config.max_model_len),
        decode=tokenizer.decode,
        eos_token_ids=eos_token_ids(model),
    )
    shape = (model.num_query_tokens, model.text_config.hidden_size)
    return engine, tokenizer.prompt_ids(""), shape, dtype


# -- in the parent ---------------------------------------------------------------------------------


class Bare:
    """Both processes. Entering loads them; `pixels_file` holds the pictures that they know."""

    def __init__(self, config: AppConfig, pixels_file: Path, pictures: int, tokens: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pictures, self._tokens = pictures, tokens
        self._inbox, self._features, self._results = (context.Queue() for _ in range(3))
        self._next = 0
        self._started: dict[int, float] = {}  # requests under way
        self._answers: list[Answer] = []
        self._processes = {
            "encoder": context.Process(
                target=encode,
                args=(config, pixels_file, self._inbox, self._features, self._results),
                daemon=True,
            ),
            "generator": context.Process(
                target=generate, args=(config, tokens, self._features, self._results), daemon=True
            ),
        }

    def __enter__(self) -> Bare:
        for process in self._processes.values():
            process.start()
        try:
            for _ in self._processes:
                self._result(READY_WITHIN_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()
            process.join()
        self._inbox.cancel_join_thread()  # nobody will read the rest

    def answer(self, picture: int) -> Answered:
        """One answer, while nothing else is under way."""
        self._ask(picture)
        return self._take()

    def start(self, users: int) -> None:
        """Lets so many users ask, each anew as soon as it is answered; returns when all were."""
        self._answers = []
        asked = [self._ask() for _ in range(users)]
        while min(self._started) <= asked[-1]:
            self._go_on()

    def go_on_until(self, closed: float) -> None:
        """Until this time of `time.perf_counter`, or the first answer after it."""
        while time.perf_counter() < closed:
            self._go_on()

    def finish(self, opened: float, closed: float) -> Window:
        """Goes on until all that was asked before `closed` is answered, then waits for the rest."""
        while min(self._started.values()) < closed:
            self._go_on()
        while self._started:
            self._take()
        return Window(opened, closed, self._answers)

    def cpu_seconds(self) -> CpuSeconds:
        """Of both processes and this one, so far."""
        pids = {name: process.pid for name, process in self._processes.items()}
        found = {}
        for name, pid in {**pids, "asking": None}.items():
            times = psutil.Process(pid).cpu_times()
            found[pid or 0, name] = times.user + times.system
        return found

    def _go_on(self) -> None:
        self._take()
        self._ask()

    def _ask(self, picture: int | None = None) -> int:
        number = self._next
        self._next += 1
        self._started[number] = time.perf_counter()
        self._inbox.put((number, number % self._pictures if picture is None else picture))
        return number

    def _take(self) -> Answered:
        answered: Answered = self._result(ANSWER_WITHIN_S)
        ended = time.perf_counter()
        assert len(answered.token_ids) == self._tokens
        self._answers.append(Answer(self._started.pop(answered.request), ended, self._tokens))
        return answered

    def _result(self, within_s: float) -> Any:
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                return self._results.get(timeout=POLL_S)
            for name, process in self._processes.items():
                if not process.is_alive():
                    raise BareFailed(f"the {name} process ended with {process.exitcode}")
        raise BareFailed(f"nothing came within {within_s:g} s")
