"""CUDA graphs: capture the kernels that a function launches, and replay them as one launch.

A graph is bound to its shapes and addresses: the captured function must read and write tensors that
stay where they are. This module does not know what is computed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# Runs a function once and returns what replays its kernels.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


def cuda_capture(priority: int = 0) -> Capture:
    """Captures graphs that share memory; they must never run at the same time.

    Kernels keep the `priority` of the stream they were captured on (-1 is high). Where two threads
    share a GPU, it keeps a stream of many small kernels from waiting for the other's large ones.
    """
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(priority=priority)

    def capture(function: Callable[[], None]) -> Callable[[], None]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()  # one-time work, such as loading kernels, must not be captured
        graph = torch.cuda.CUDAGraph()
        with no_garbage_collection(), torch.cuda.graph(graph, pool=pool, stream=stream):
            function()
        return graph.replay

    return capture


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Freeing GPU memory, such as that of an earlier graph, would invalidate a capture."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
