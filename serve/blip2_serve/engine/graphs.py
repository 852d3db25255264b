"""Decode steps as CUDA graphs: some 370 kernels, launched as one.

A decode step of few sequences takes a GPU less time than Python takes to launch its kernels. A
graph is a recording of them, for fixed shapes and addresses: so there is one for each number of
sequences and each width, from a short list of both, and a step is padded to the next. All are
recorded at the start, since recording takes longer than a step.

This module does not know what a step computes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from blip2_serve.model.transfer import pinned

logger = logging.getLogger(__name__)

# (ids, starts, rows, width): int64 [n] each -> float32 logits [n, vocabulary]
Step = Callable[[Tensor, Tensor, Tensor, int], Tensor]

# Runs what it is given and returns what runs it again.
Record = Callable[[Callable[[], None]], Callable[[], None]]

LEAST_WIDTH = 64


class DecodeGraphs:
    """`step` for up to `slots` sequences of up to `columns` tokens.

    Padding is one token with the id 0, at position 0, in KV row 0 and in the slots behind those in
    use. Row 0 is nobody's: rows count from 1. A slot that no sequence owns is filled, from its
    column 0 on, before the next one reads it (`DecodeSlots.place`). So padding may be written.
    """

    @torch.inference_mode()
    def __init__(
        self,
        step: Step,
        *,
        slots: int,
        columns: int,
        vocabulary: int,
        device: torch.device,
        record: Record,
    ) -> None:
        self._sizes, self._widths = batch_sizes(slots), widths(columns)
        # All graphs write their logits here: what each had of its own would have to be kept.
        self._logits = torch.empty((slots, vocabulary), dtype=torch.float32, device=device)
        self._inputs = {
            size: torch.zeros((3, size), dtype=torch.int64, device=device) for size in self._sizes
        }

        def step_of(size: int, width: int) -> Callable[[], None]:
            def run() -> None:
                ids, starts, rows = self._inputs[size]
                self._logits[:size] = step(ids, starts, rows, width)

            return run

        start = time.monotonic()
        # The largest first: the others then fit into the memory that it has left.
        self._replays = {
            (size, width): record(step_of(size, width))
            for size in reversed(self._sizes)
            for width in reversed(self._widths)
        }
        seconds = time.monotonic() - start
        logger.info("recorded %d decode steps in %.1f s", len(self._replays), seconds)

    @torch.inference_mode()
    def run(self, ids: list[int], starts: list[int], rows: list[int], width: int) -> Tensor:
        """float32 logits [len(ids), vocabulary], which the next run overwrites.

        One token of each sequence: its id, its position, its KV row; no position reaches `width`.
        """
        size = _next(self._sizes, len(ids))
        padding = [0] * (size - len(ids))
        inputs = torch.tensor([[*column, *padding] for column in (ids, starts, rows)])
        self._inputs[size].copy_(pinned(inputs, self._logits.device), non_blocking=True)
        self._replays[size, _next(self._widths, width)]()
        return self._logits[: len(ids)]


def batch_sizes(slots: int) -> list[int]:
    """1, 2, 4 and multiples of 8: a sequence more costs a step its KV reads, and little else."""
    return [size for size in (1, 2, 4, *range(8, slots, 8)) if size < slots] + [slots]


def widths(columns: int) -> list[int]:
    """Doubling: a step reads at most twice the keys and values that it needs."""
    doubled = []
    width = LEAST_WIDTH
    while width < columns:
        doubled.append(width)
        width *= 2
    return [*doubled, columns]


def cuda_recorder() -> Record:
    """Records CUDA graphs that share memory; they must never run at the same time."""
    pool = torch.cuda.graph_pool_handle()
    # Kernels keep the priority of the stream that they were recorded on: where an encoder works
    # on the same GPU, each of the many small ones would wait for a large one of its.
    stream = torch.cuda.Stream(priority=-1)

    def record(step: Callable[[], None]) -> Callable[[], None]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # what happens only once (kernels are loaded, workspaces taken) is no recording
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            step()
        return graph.replay

    return record


def no_recorder(step: Callable[[], None]) -> Callable[[], None]:
    """For tests: the same steps with the same padding, run one kernel after the other."""
    step()
    return step


def _next(sizes: Iterable[int], least: int) -> int:
    return next(size for size in sizes if size >= least)
