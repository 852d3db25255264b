"""Runs the decoder over one step's chunks and keeps their keys and values.

It knows nothing of sampling, of why these chunks were scheduled, or of what the device does faster
than others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blip2_serve.compute.base import Device
from blip2_serve.compute.mixed import decode_inputs
from blip2_serve.engine.sequence import Chunk
from blip2_serve.model.decoder import OptDecoder


class Runner:
    """A decoder on `device`, with a KV cache of `num_slots` slots.

    Steps have up to `max_num_seqs` sequences of up to `max_len` tokens, and up to
    `max_num_batched_tokens` tokens in all, which are padded to a multiple of `pad_to`, as
    `Device.prepare_decoder` returns it.
    """

    def __init__(
        self,
        decoder: OptDecoder,
        device: Device,
        num_slots: int,
        *,
        max_num_seqs: int,
        max_len: int,
        max_num_batched_tokens: int = 512,
        pad_to: int = 1,
    ) -> None:
        self._decoder = decoder
        self._device = device
        self._pad_to = pad_to
        weight = decoder.embed_tokens.weight
        heads = decoder.config.num_attention_heads
        # Slots count from 1; slot 0 takes what padding writes. Zeroed, which allocates the pages:
        # that takes longer than a slot's attention, and may fail once requests are running.
        self._kv = torch.zeros(
            (len(decoder.layers), 2, num_slots + 1, heads, decoder.head_dim),
            dtype=weight.dtype,
            device=weight.device,
        )
        self.decode = device.prepare_decode(
            self._decode_step, decoder, max_num_seqs=max_num_seqs, max_len=max_len
        )
        self._mixed = device.prepare_mixed(
            decoder,
            self._kv,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_len=max_len,
            pad_to=pad_to,
        )

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> Tensor:
        """Computes all chunks -> float32 logits [n, vocabulary], one row per completing chunk.

        The next run may overwrite them.
        """
        if all(c.decodes for c in chunks):
            return self.decode(decode_inputs(chunks, self._device, self._pad_to))[: len(chunks)]
        return self._mixed(chunks)

    def _decode_step(self, inputs: Tensor) -> Tensor:
        """A `DecodeStep`."""
        ids, positions, slots = inputs[:, 0], inputs[:, 1], inputs[:, 2:]
        hidden = self._decoder(
            self._decoder.embed_tokens(ids),
            positions,
            self._device.attend_decode(self._kv, slots, positions),
            self._device.add_norm,
        )
        return self._decoder.logits(hidden)


def slot_bytes(decoder: OptDecoder) -> int:
    """Bytes of one KV slot: one token's keys and values of every layer."""
    config = decoder.config
    element = decoder.embed_tokens.weight.element_size()
    return int(2 * config.num_hidden_layers * config.hidden_size * element)
