"""Copies between main memory and a GPU that the caller need not wait for.

From ordinary memory the driver copies by way of a buffer of its own, and torch waits until the GPU
has done all that was asked of it before. From page-locked memory the copy itself is queued. torch
keeps page-locked memory for the next time, and does not hand it out again before the copies from
it are over: nobody here has to keep a tensor alive. Where there is no GPU, nothing is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor in page-locked memory, if it is to go to a GPU and is not there already."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory()
    return tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. Work that is asked for later finds it there."""
    return pinned(tensor, device).to(device, non_blocking=True)


def download(tensor: Tensor) -> Tensor:
    """The tensor in main memory, once it is computed."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host
