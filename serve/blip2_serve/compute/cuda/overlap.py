"""Programmatic dependent launch: a kernel starts while the one before it is still ending.

Between two small kernels of a step, a GPU is idle for about a microsecond. A kernel launched with
`options` fills it: it can load what no kernel writes, such as weights, before it waits for the
kernel before it. Such a kernel

- calls `gdc_launch_dependents()` first: the next one may start once all its programs run;
- calls `gdc_wait()` in every program before it reads what other kernels write, and before it
  writes anything. That waits for all kernels before it, since each of them waits itself.

Both calls need a GPU of compute capability 9; kernels make them if their constant `overlap` is set.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether kernels on `device` can overlap."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def options(device: torch.device) -> dict[str, bool]:
    """How to launch a kernel that follows the rules above: constants and launch options."""
    return {"overlap": True, "launch_pdl": True} if overlaps(device) else {"overlap": False}
