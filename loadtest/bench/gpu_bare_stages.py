"""For `gpu_app.py`: the two bare processes, each of which does as its stage of the server does."""

from __future__ import annotations

import contextlib
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blip2_serve.compute.assembly import EngineLimits, assemble
from blip2_serve.compute.base import Device, prepare_thread
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
from loadtest.bench.gpu_bare import READY, Answered

SWITCH_INTERVAL_S = 0.0002  # as the generator stage has it on a GPU


def encode(config: AppConfig, pixels_file: Path, inbox: Any, features: Any, results: Any) -> None:
    """Takes (request, picture) from `inbox`; puts (request, features as bytes) into `features`.

    As the encoder stage does, but the pixels, uint8 [pictures, 3, S, S], are here already.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent ends this process
    pictures = np.load(pixels_file)
    device = open_device(config.device)
    prepare_thread(device.place, config.encoder.threads)
    checkpoint = open_checkpoint(config.model)
    dtype = resolve_dtype(config.dtype, device.place, checkpoint.config)
    encoder = ImageEncoder.load(
        checkpoint, ImageProcessor.load(checkpoint.folder), device.place, dtype
    )
    limit = config.encoder.max_batch_size
    run = device.prepare_encoder(encoder, limit, config.encoder.quantize)
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
    device = open_device(config.device)
    engine, prompt, shape, dtype = _load(config, device)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
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
            image = device.host_tensor(shape, dtype)
            image.view(torch.uint8).numpy().reshape(-1)[:] = np.frombuffer(data, np.uint8)
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


def _load(
    config: AppConfig, device: Device
) -> tuple[Engine, list[int], tuple[int, int], torch.dtype]:
    """The generator's engine, a caption's prompt, and shape and dtype of an image's features."""
    own = config.generator
    prepare_thread(device.place, own.threads)
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
