"""Decode steps as CUDA graphs: some 330 kernels, launched as one.

A decode step of few sequences takes a GPU less time than Python takes to launch its kernels. A
graph is for a fixed number of sequences: so there is one for each number of a short list, and a
step is padded to the next. All are recorded at the start, since recording takes longer than a step.

This module does not know what a step computes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from blip2_serve.compute.cuda.capture import Record

logger = logging.getLogger(__name__)

# int64 [n, 2 + columns] -> float32 logits [n, vocabulary]; see DecodeGraphs.run
Step = Callable[[Tensor], Tensor]


class DecodeGraphs:
    """`step` for up to `sequences` sequences of up to `columns` tokens.

    Padding is one token with the id 0, at position 0, in KV row 0. That row is nobody's (rows count
    from 1), so it may be written.
    """

    @torch.inference_mode()
    def __init__(
        self,
        step: Step,
        *,
        sequences: int,
        columns: int,
        vocabulary: int,
        device: torch.device,
        record: Record,
    ) -> None:
        self.sequences, self.columns = sequences, columns
        self._sizes = batch_sizes(sequences)
        # All graphs read and write here: what each had of its own would have to be kept.
        self._logits = torch.empty((sequences, vocabulary), dtype=torch.float32, device=device)
        self._inputs = torch.zeros((sequences, 2 + columns), dtype=torch.int64, device=device)

        def step_of(size: int) -> Callable[[], None]:
            def run() -> None:
                self._logits[:size] = step(self._inputs[:size])

            return run

        start = time.monotonic()
        # The largest first: the others then fit into the memory that it has left.
        self._replays = {size: record(step_of(size)) for size in reversed(self._sizes)}
        seconds = time.monotonic() - start
        logger.info("recorded %d decode steps in %.1f s", len(self._replays), seconds)

    @torch.inference_mode()
    def run(self, inputs: Tensor) -> Tensor:
        """float32 logits [n, vocabulary], which the next run overwrites.

        `inputs` is int64 [n, at most 2 + columns]: a token of each sequence, its position, and the
        KV rows of all positions up to it.
        """
        count, width = inputs.shape
        size = next(size for size in self._sizes if size >= count)
        self._inputs[:count, :width].copy_(inputs, non_blocking=True)
        self._inputs[count:size, :3] = 0
        self._replays[size]()
        return self._logits[:count]


def batch_sizes(sequences: int) -> list[int]:
    """1, 2, 4 and multiples of 8: a sequence more costs a step its KV reads, and little else."""
    return [n for n in (1, 2, 4, *range(8, sequences, 8)) if n < sequences] + [sequences]
