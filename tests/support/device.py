"""Where tests of the engine compute: on a GPU if there is one."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from blip2_serve.compute.base import Decode, DecodeStep, Device
from blip2_serve.model.decoder import OptDecoder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # conftest.py imports this before anybody imports Triton


def run_again(function: Callable[[], None]) -> Callable[[], None]:
    """A `Capture` that replays by running the function again: kernel after kernel."""
    function()
    return function


class Capturing(Device):
    """Plain torch with decode steps padded and replayed as captured ones are."""

    def prepare_decode(
        self, step: DecodeStep, decoder: OptDecoder, *, max_num_seqs: int, max_len: int
    ) -> Decode:
        from blip2_serve.compute.cuda.graphs import DecodeGraphs

        graphs = DecodeGraphs(
            step,
            self,
            max_num_seqs=max_num_seqs,
            max_len=max_len,
            vocabulary=decoder.config.vocab_size,
            capture=run_again,
        )
        return graphs.run
