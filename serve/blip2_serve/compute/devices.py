"""Opens a device by name. Each kind is imported only where it is used: their compilers differ."""

from __future__ import annotations

import torch

from blip2_serve.compute.base import Device
from blip2_serve.errors import StartupError

FP8_CAPABILITY = (8, 9)  # of the first GPUs that multiply numbers of 8 bits in floating point


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


def check_quantize(place: torch.device, quantize: str | None) -> None:
    """Raises StartupError unless that device can compute with such weights.

    `quantize` is the generator's ("int8"), the encoder's ("fp8") or None.
    """
    if quantize is None:
        return
    if quantize == "fp8":
        if place.type != "cuda" or torch.cuda.get_device_capability(place) < FP8_CAPABILITY:
            raise StartupError(
                "encoder.quantize: fp8 needs a GPU of compute capability 8.9 or higher (Ada, "
                "Hopper or later): leave it out"
            )
        return
    if place.type != "cpu":
        raise StartupError(
            f"--quantize {quantize} is for CPUs only: leave it out, or start with --device cpu"
        )
    from blip2_serve.compute.cpu import int8_product

    if not int8_product.available():
        raise StartupError(
            f"--quantize {quantize} needs a CPU with AVX512-VNNI, which this machine's lacks: "
            "leave it out"
        )
