"""CUDA graphs: recordings of the kernels that a function launches, which run again as one launch.

A graph is good for the same shapes and addresses: its function reads and writes tensors that stay
where they are. This module does not know what is computed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# Runs what it is given and returns what runs it again.
Record = Callable[[Callable[[], None]], Callable[[], None]]


def cuda_recorder(priority: int = 0) -> Record:
    """Records graphs that share memory; they must never run at the same time.

    Kernels keep the `priority` of the stream that they were recorded on, -1 for a high one: where
    two threads use one GPU, each of many small kernels would wait for a large one of the other's.
    """
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(priority=priority)

    def record(function: Callable[[], None]) -> Callable[[], None]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()  # what happens only once (kernels are loaded) is not to be recorded
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            function()
        return graph.replay

    return record


def no_recorder(function: Callable[[], None]) -> Callable[[], None]:
    """For tests: the same, one kernel after the other."""
    function()
    return function
