"""Assembles an engine: sizes the KV cache and puts scheduler, runner and sampler together."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from blip2_serve.compute.base import Device
from blip2_serve.compute.runner import Runner, slot_bytes
from blip2_serve.compute.sampler import Sampler
from blip2_serve.engine.detokenizer import Decode
from blip2_serve.engine.engine import Engine
from blip2_serve.engine.scheduler import Scheduler
from blip2_serve.engine.slots import KvSlots
from blip2_serve.errors import StartupError
from blip2_serve.model.decoder import OptDecoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineLimits:
    """`config.GeneratorConfig` says what they mean."""

    max_num_seqs: int = 64
    max_waiting: int = 256
    max_num_batched_tokens: int = 512
    kv_slots: int | None = None
    kv_memory_fraction: float = 0.3
    prefix_caching: bool = True


def assemble(
    decoder: OptDecoder,
    device: Device,
    limits: EngineLimits,
    *,
    pad_to: int,
    min_len: int,
    max_len: int,
    decode: Decode,
    eos_token_ids: tuple[int, ...],
) -> Engine:
    """An engine around a decoder that `Device.prepare_decoder` has prepared and returned `pad_to`.

    Requests take `min_len` to `max_len` tokens, the image's and the answer's included.

    Raises:
        StartupError: there is no memory for even the shortest request.
    """
    size = slot_bytes(decoder)
    slots = num_kv_slots(limits, device.typical_len(max_len), device.free_memory() // size)
    check_kv_slots(slots, min_len, size, limits)
    logger.info("KV cache: %d slots, %.2f GB", slots, slots * size / 1e9)
    scheduler = Scheduler(
        KvSlots(slots),
        max_num_seqs=limits.max_num_seqs,
        max_waiting=limits.max_waiting,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        prefix_caching=limits.prefix_caching,
    )
    runner = Runner(
        decoder,
        device,
        slots,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_len=max_len,
        pad_to=pad_to,
    )
    return Engine(
        runner,
        scheduler,
        Sampler(eos_token_ids, device),
        decode=decode,
        eos_token_ids=eos_token_ids,
        asynchronous=device.asynchronous,
    )


def num_kv_slots(limits: EngineLimits, typical_len: int, free_slots: int) -> int:
    """As many slots as `max_num_seqs` typical sequences need, if the memory allows.

    That is `kv_memory_fraction` of the free memory, which has room for `free_slots`.
    """
    allowed = int(free_slots * limits.kv_memory_fraction)
    return limits.kv_slots or min(limits.max_num_seqs * typical_len, allowed)


def check_kv_slots(slots: int, min_len: int, size: int, limits: EngineLimits) -> None:
    """Raises StartupError if the shortest request (`min_len` slots of `size` bytes) cannot fit."""
    if slots >= min_len:
        return
    needed = f"the shortest request needs {min_len} slots of {size:,} bytes"
    if limits.kv_slots:
        raise StartupError(f"generator.kv_slots is {slots}, but {needed}: set it higher")
    raise StartupError(
        f"after loading the model there is memory for {slots} KV slots "
        f"({limits.kv_memory_fraction:g} of what is free, generator.kv_memory_fraction), but "
        f"{needed}: give the replica more memory, raise the fraction, or serve in bfloat16"
    )
