"""Opens a device by name. Each kind is imported only where it is used: their compilers differ."""

from __future__ import annotations

import torch

from blip2_serve.compute.base import Device


def open_device(name: str) -> Device:
    """The device for torch's name of it: "cpu", "cuda" or "cuda:1"."""
    place = torch.device(name)
    if place.type == "cuda":
        from blip2_serve.compute.cuda.device import CudaDevice

        return CudaDevice(place)
    if place.type == "cpu":
        from blip2_serve.compute.cpu.device import CpuDevice

        return CpuDevice(place)
    return Device(place)
