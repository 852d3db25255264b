"""Runs the decoder over one step's chunks and keeps their keys and values.

The only module that knows how the KV cache lies in memory. It knows nothing of sampling, of why
these chunks were scheduled, or of what the device does faster than others.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from blip2_serve.compute.base import Device, attend_parts
from blip2_serve.engine.sequence import Chunk
from blip2_serve.model.decoder import Attend, OptDecoder


class Runner:
    """A decoder on `device`, with a KV cache of `num_slots` slots.

    Steps have up to `max_num_seqs` sequences of up to `max_len` tokens; the number of their tokens
    is padded to a multiple of `pad_to`, as `Device.prepare_decoder` returns it.
    """

    def __init__(
        self,
        decoder: OptDecoder,
        device: Device,
        num_slots: int,
        *,
        max_num_seqs: int,
        max_len: int,
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

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> Tensor:
        """Computes all chunks -> float32 logits [n, vocabulary], one row per completing chunk.

        The next run may overwrite them.
        """
        if all(c.sequence.output and c.end - c.start == 1 for c in chunks):
            return self.decode(self._decode_inputs(chunks))[: len(chunks)]
        singles = [c for c in chunks if c.end - c.start == 1]
        # Prompts of one length are neighbours: they attend in one call.
        others = sorted((c for c in chunks if c.end - c.start > 1), key=lambda c: (c.start, c.end))
        ordered = [*singles, *others]
        logits = self._mixed_step(ordered, len(singles))
        completing = [c for c in ordered if c.completes]
        wanted = [c for c in chunks if c.completes]
        if completing == wanted:
            return logits
        row_of = {c: row for row, c in enumerate(completing)}
        return logits[[row_of[c] for c in wanted]]

    # -- every sequence decodes ------------------------------------------------------------------

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

    def _decode_inputs(self, chunks: list[Chunk]) -> Tensor:
        """The input of a `DecodeStep`, in main memory; with padding."""
        width = 2 + max(c.end for c in chunks)
        inputs = self._device.host_tensor((self._padded(len(chunks)), width), torch.int64)
        lines = inputs.numpy()
        lines[len(chunks) :, :3] = 0
        for line, chunk in zip(lines, chunks, strict=False):
            sequence, start = chunk.sequence, chunk.start
            line[0], line[1] = sequence.token_at(start), start
            line[2 : 3 + start] = np.frombuffer(sequence.slots, np.int64, 1 + start)
        return inputs

    # -- some sequences are in prefill -----------------------------------------------------------

    def _mixed_step(self, chunks: list[Chunk], singles: int) -> Tensor:
        """Any mixture, single tokens first -> logits of the completing chunks, in their order."""
        positions = [p for c in chunks for p in range(c.start, c.end)]
        hidden = self._decoder(
            self._embed(chunks),
            self._indices(positions),
            self._attention(chunks, singles),
            self._device.add_norm,
        )
        ends = itertools.accumulate(c.end - c.start for c in chunks)
        completing = [end - 1 for c, end in zip(chunks, ends, strict=True) if c.completes]
        logits = self._decoder.logits(hidden[self._indices(completing)])
        return logits[: len(completing)]

    def _embed(self, chunks: list[Chunk]) -> Tensor:
        ids = [c.sequence.token_at(p) for c in chunks for p in range(c.start, c.end)]
        embeddings: Tensor = self._decoder.embed_tokens(self._indices(ids))
        offset = 0
        for chunk in chunks:
            image = chunk.sequence.request.image[chunk.start : chunk.end]  # empty past its tokens
            if len(image):
                embeddings[offset : offset + len(image)] = self._device.upload(image)
            offset += chunk.end - chunk.start
        return embeddings

    def _attention(self, chunks: list[Chunk], singles: int) -> Attend:
        kv, device = self._kv, self._device
        parts: list[tuple[int, Attend]] = []
        if singles:
            inputs = device.upload(self._decode_inputs(chunks[:singles])[:singles])
            parts.append((singles, device.attend_decode(kv, inputs[:, 2:], inputs[:, 1])))
        for (start, end), alike in itertools.groupby(
            chunks[singles:], key=lambda c: (c.start, c.end)
        ):
            tables = [c.sequence.slots[:end] for c in alike]
            if start == 0:
                slots = device.upload(torch.tensor([slot for table in tables for slot in table]))
                parts.append((len(slots), device.attend_prefill(kv, slots, len(tables))))
            else:
                for table in tables:
                    slots = device.upload(torch.tensor(table))
                    parts.append((end - start, device.attend_chunk(kv, slots, start)))
        return attend_parts(parts)

    def _indices(self, values: list[int]) -> Tensor:
        """int64 on the device, padded with zeros."""
        padding = [0] * (self._padded(len(values)) - len(values))
        return self._device.upload(torch.tensor(values + padding, dtype=torch.int64))

    def _padded(self, count: int) -> int:
        return count + -count % self._pad_to


def slot_bytes(decoder: OptDecoder) -> int:
    """Bytes of one KV slot: one token's keys and values of every layer."""
    config = decoder.config
    element = decoder.embed_tokens.weight.element_size()
    return int(2 * config.num_hidden_layers * config.hidden_size * element)
