"""An engine without memory for its KV cache does not start, and its error has the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from blip2_serve.compute.assembly import EngineLimits, assemble
from blip2_serve.compute.base import Device
from blip2_serve.compute.cpu.device import CpuDevice
from blip2_serve.engine.engine import Engine
from blip2_serve.errors import StartupError
from blip2_serve.model.checkpoint import open_checkpoint, shortest_sequence
from blip2_serve.model.decoder import OptDecoder
from blip2_serve.model.source import DEMO

CPU = torch.device("cpu")


class SmallDevice(Device):
    def free_memory(self) -> int:
        return 96_000


def assembled(device: Device, max_len: int = 100, **limits: Any) -> Engine:
    checkpoint = open_checkpoint(DEMO)
    return assemble(
        OptDecoder.load(checkpoint, CPU, torch.float32),
        device,
        EngineLimits(**limits),
        pad_to=1,
        min_len=shortest_sequence(checkpoint.config),
        max_len=max_len,
        decode=lambda _: "",
        eos_token_ids=(2,),
    )


def test_too_little_memory_is_reported_with_the_numbers() -> None:
    with pytest.raises(StartupError) as error:
        assembled(SmallDevice(CPU))

    assert "memory for 6 KV slots" in error.value.message
    assert "needs 10 slots of 4,096 bytes" in error.value.message
    assert "kv_memory_fraction" in error.value.message


def test_too_few_configured_slots_are_reported_with_their_key() -> None:
    with pytest.raises(StartupError, match=r"kv_slots is 9, but .* needs 10 slots"):
        assembled(Device(CPU), kv_slots=9)


@pytest.mark.parametrize(
    ("device", "limits", "slots"),
    [
        pytest.param(Device, {"max_num_seqs": 2}, 2 * 700, id="sequences of full length"),
        pytest.param(CpuDevice, {"max_num_seqs": 2}, 2 * 512, id="of usual length on a CPU"),
        pytest.param(Device, {"kv_slots": 50}, 50, id="as configured"),
        pytest.param(
            SmallDevice, {"kv_memory_fraction": 0.9}, 20, id="as far as the memory allows"
        ),
    ],
)
def test_the_kv_cache_has_room_for(device: type[Device], limits: Any, slots: int) -> None:
    assert assembled(device(CPU), max_len=700, **limits).stats().kv_slots_total == slots
