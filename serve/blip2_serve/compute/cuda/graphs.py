"""Decode steps and batches of images as CUDA graphs: hundreds of kernels, launched as one.

A decode step of few sequences takes a GPU less time than Python takes to launch its 330 kernels. A
graph is bound to its number of sequences, so there is one for each of a short list of sizes, and a
step is padded to the next. All are captured at the start: capturing takes longer than a step.

This module does not know what is computed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from blip2_serve.compute.base import DecodeStep, Device, Encode
from blip2_serve.compute.cuda.capture import Capture

logger = logging.getLogger(__name__)


class DecodeGraphs:
    """`step`, captured for up to `max_num_seqs` sequences of up to `max_len` tokens."""

    @torch.inference_mode()
    def __init__(
        self,
        step: DecodeStep,
        device: Device,
        *,
        max_num_seqs: int,
        max_len: int,
        vocabulary: int,
        capture: Capture,
    ) -> None:
        self._step, self._device = step, device
        self._max_num_seqs, self._width = max_num_seqs, 2 + max_len
        self._sizes = batch_sizes(max_num_seqs)
        # All graphs read and write the same tensors: tensors of their own would have to be kept.
        self._logits = torch.empty(
            (max_num_seqs, vocabulary), dtype=torch.float32, device=device.place
        )
        self._inputs = torch.zeros(
            (max_num_seqs, self._width), dtype=torch.int64, device=device.place
        )

        def step_of(size: int) -> Callable[[], None]:
            def run() -> None:
                self._logits[:size] = step(self._inputs[:size])

            return run

        start = time.monotonic()
        # The largest first: the others fit into its memory.
        self._replays = {size: capture(step_of(size)) for size in reversed(self._sizes)}
        seconds = time.monotonic() - start
        logger.info("captured %d decode steps in %.1f s", len(self._replays), seconds)

    @torch.inference_mode()
    def run(self, inputs: Tensor) -> Tensor:
        """A `Decode`: its logits are overwritten by the next run. Larger steps run uncaptured."""
        count, width = inputs.shape
        if count > self._max_num_seqs or width > self._width:
            return self._step(self._device.upload(inputs))
        size = next(size for size in self._sizes if size >= count)
        self._inputs[:count, :width].copy_(inputs, non_blocking=True)
        self._inputs[count:size, :3] = 0
        self._replays[size]()
        return self._logits[:count]


def batch_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4 and multiples of 8: one more sequence costs a step its KV reads, and little else."""
    return [n for n in (1, 2, 4, *range(8, max_num_seqs, 8)) if n < max_num_seqs] + [max_num_seqs]


class EncoderGraphs:
    """`encode` with a CUDA graph for each batch of 1 to `max_batch_size` images.

    `encode` maps uint8 [B, 3, size, size] on the device to image features.

    A small batch keeps a GPU busy for less time than Python takes to launch its kernels.
    """

    @torch.inference_mode()
    def __init__(
        self, encode: Encode, size: int, device: Device, max_batch_size: int, capture: Capture
    ) -> None:
        self._encode = encode
        self._device = device
        start = time.monotonic()
        # The largest first: the others fit into its memory.
        self._batches = {
            count: _EncoderGraph(encode, (count, 3, size, size), device, capture)
            for count in range(max_batch_size, 0, -1)
        }
        logger.info("captured %d batches in %.1f s", max_batch_size, time.monotonic() - start)

    @torch.inference_mode()
    def run(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] in main memory -> image features [B, queries, hidden]."""
        if batch := self._batches.get(len(pixels)):
            return batch.run(pixels)
        return self._encode(self._device.upload(pixels))


class _EncoderGraph:
    """One captured batch size, with the tensors the graph reads and writes."""

    def __init__(
        self, encode: Encode, shape: tuple[int, ...], device: Device, capture: Capture
    ) -> None:
        self._input = torch.zeros(shape, dtype=torch.uint8, device=device.place)
        self._output = encode(self._input)

        def run() -> None:
            self._output.copy_(encode(self._input))

        self._replay: Callable[[], None] = capture(run)

    def run(self, pixels: Tensor) -> Tensor:
        """A copy of the output: the next replay overwrites it."""
        self._input.copy_(pixels, non_blocking=True)
        self._replay()
        return self._output.clone()
