"""Captured steps without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from blip2_serve.compute.base import Decode, DecodeStep, Device, MixedStep
from blip2_serve.compute.cuda.graphs import DecodeGraphs
from blip2_serve.model.decoder import OptDecoder


def run_again(function: Callable[[], None]) -> Callable[[], None]:
    """A `Capture` that replays by running the function again."""
    function()
    return function


class Capturing(Device):
    """Plain torch, with decode steps padded and replayed like captured ones."""

    def prepare_decode(
        self, step: DecodeStep, decoder: OptDecoder, *, max_num_seqs: int, max_len: int
    ) -> Decode:
        graphs = DecodeGraphs(
            step,
            self,
            max_num_seqs=max_num_seqs,
            max_len=max_len,
            vocabulary=decoder.config.vocab_size,
            capture=run_again,
        )
        return graphs.run


class CapturingMixed(Capturing):
    """With mixed steps as well. Needs Triton."""

    def prepare_mixed(
        self,
        decoder: OptDecoder,
        kv: Tensor,
        *,
        pad_to: int,  # noqa: ARG002
        **limits: Any,
    ) -> MixedStep:
        from blip2_serve.compute.cuda.mixed_graphs import MixedGraphs

        return MixedGraphs(decoder, self, kv, **limits, capture=run_again).run
