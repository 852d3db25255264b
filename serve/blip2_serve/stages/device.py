"""What stages ask of the device they compute on: threads and memory."""

from __future__ import annotations

import torch

from blip2_serve import machine


def set_threads(threads: int | None) -> None:
    """Sets how many threads torch uses when called from this thread; None: all usable cores.

    Ray sets OMP_NUM_THREADS to the CPUs that the replica reserves, rounded up: 1. OpenMP keeps the
    number per calling thread, so every thread that computes must call this.
    """
    torch.set_num_threads(threads or machine.cores())


def size_of(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters, each counted once."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return machine.available_memory()


def gpu_memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes in use on the GPU, by any process, and bytes in total; None for a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free, total
