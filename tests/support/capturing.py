"""Captured steps and batches without a GPU."""

from __future__ import annotations

from collections.abc import Callable

from blip2_serve.compute.base import Decode, DecodeStep, Device
from blip2_serve.compute.cuda.graphs import DecodeGraphs
from blip2_serve.model.decoder import OptDecoder


def run_again(function: Callable[[], None]) -> Callable[[], None]:
    """A `Capture` that replays by running the function again: kernel after kernel."""
    function()
    return function


class Capturing(Device):
    """Plain torch with decode steps padded and replayed as captured ones are."""

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
