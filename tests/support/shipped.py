"""The shipped language model, in engines without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import blip2_serve.demo
from blip2_serve.compute.assembly import EngineLimits, assemble
from blip2_serve.compute.base import Device
from blip2_serve.engine.engine import Engine
from blip2_serve.engine.sequence import Request
from blip2_serve.model.checkpoint import (
    eos_token_ids,
    longest_sequence,
    open_checkpoint,
    shortest_sequence,
)
from blip2_serve.model.decoder import OptDecoder
from blip2_serve.model.tokenizer import Tokenizer
from blip2_serve.types import SamplingParams, TokenEvent
from support.device import DEVICE
from support.resuming import Sent, check_last

CHECKPOINT = Path(blip2_serve.demo.__file__).parent / "checkpoint"


class Ahead(Device):
    """Computes at once, but has the engine launch each step before it takes the last one's."""

    asynchronous = True


class Model:
    """The shipped decoder and tokenizer; every run has an engine of its own."""

    def __init__(self) -> None:
        self.checkpoint = open_checkpoint(str(CHECKPOINT))
        self.decoder = OptDecoder.load(self.checkpoint, DEVICE, torch.float32)
        self.tokenizer = Tokenizer(self.checkpoint.folder, self.checkpoint.config)
        queries = self.checkpoint.config.num_query_tokens
        hidden = self.decoder.config.hidden_size
        self.image = torch.randn(queries, hidden, generator=torch.Generator().manual_seed(5))

    def engine(self, device: Device) -> Engine:
        return assemble(
            self.decoder,
            device,
            EngineLimits(max_num_seqs=4, max_num_batched_tokens=24, kv_slots=400),
            pad_to=1,
            min_len=shortest_sequence(self.checkpoint.config),
            max_len=longest_sequence(self.checkpoint.config, 128),
            decode=self.tokenizer.decode,
            eos_token_ids=eos_token_ids(self.checkpoint.config),
        )

    def request(self, name: str, sent: Sent = (), **params: Any) -> Request:
        prompt = self.tokenizer.prompt_ids("Question: what is in the picture? Answer:")
        own = SamplingParams(**{"max_tokens": 14, "ignore_eos": True, **params})
        return Request(name, prompt, self.image, "image", own, sent)

    def run(self, device: Device, sent: Sent, **params: Any) -> list[TokenEvent]:
        """The events of one request."""
        engine = self.engine(device)
        engine.add(self.request("a", sent, **params))
        events = []
        while engine.has_work:
            result = engine.step()
            assert not result.failures
            events += [event for _, event in result.events]
            engine.check_integrity()
        engine.check_idle()
        check_last(events)
        return events
