"""What a generator replica computes with.

Importing it takes seconds, of torch and transformers: the thread that loads the model does that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import transformers
from torch import Tensor

from blip2_serve import __version__
from blip2_serve.compute.assembly import EngineLimits, assemble
from blip2_serve.compute.base import Device, prepare_thread
from blip2_serve.compute.devices import check_quantize, open_device
from blip2_serve.config import AppConfig
from blip2_serve.engine.engine import Engine
from blip2_serve.model.checkpoint import (
    eos_token_ids,
    longest_sequence,
    open_checkpoint,
    resolve_dtype,
    shortest_sequence,
    tensor_bytes,
)
from blip2_serve.model.decoder import OptDecoder
from blip2_serve.model.tokenizer import Tokenizer
from blip2_serve.observe.instruments import Model
from blip2_serve.observe.loading import measured_loading
from blip2_serve.stages.vital_signs import fingerprint_of
from blip2_serve.types import ImageFeatures


@dataclass(frozen=True)
class LanguageModel:
    """OPT in an engine, with its tokenizer."""

    engine: Engine
    tokenizer: Tokenizer
    device: Device
    prepare_thread: Callable[[], None]  # for the thread that runs the engine
    max_model_len: int  # tokens
    fingerprint: str  # of the checkpoint
    loaded: Model
    build_info: dict[str, str]

    def tensor_of(self, features: ImageFeatures) -> Tensor:
        """[queries, hidden] in main memory, from where the runner copies it."""
        tensor = self.device.host_tensor(features.shape, getattr(torch, features.dtype))
        tensor.view(torch.uint8).numpy().reshape(-1)[:] = np.frombuffer(features.data, np.uint8)
        return tensor


def load(config: AppConfig, device_name: str) -> LanguageModel:
    """Loads the language model; `device_name` is "cpu" or "cuda"."""
    own = config.generator
    device = open_device(device_name)
    prepare = partial(prepare_thread, device.place, own.threads)
    prepare()
    check_quantize(device.place, own.quantize)
    checkpoint = open_checkpoint(config.model, config.revision)
    tokenizer = Tokenizer(checkpoint.folder, checkpoint.config)
    dtype = resolve_dtype(config.dtype, device.place, checkpoint.config)
    with measured_loading("language model") as report:
        decoder = OptDecoder.load(checkpoint, device.place, dtype)
        report.tensor_bytes = tensor_bytes(decoder)
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
    return LanguageModel(
        engine=engine,
        tokenizer=tokenizer,
        device=device,
        prepare_thread=prepare,
        max_model_len=max_len,
        fingerprint=fingerprint_of(config, checkpoint.folder, dtype),
        loaded=Model(report, device.gpu_memory),
        build_info={
            "version": __version__,
            "model": config.model_name,
            "dtype": report.dtype,
            "device": device.place.type,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )
