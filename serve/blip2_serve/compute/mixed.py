"""Steps with prefill in plain torch: parts of the step that attend alike, one after the other."""

from __future__ import annotations

import itertools
from array import array
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from blip2_serve.engine.sequence import Chunk
from blip2_serve.model.decoder import Attend, OptDecoder

if TYPE_CHECKING:
    from blip2_serve.compute.base import Device


class MixedParts:
    """A `MixedStep` for any device; the number of tokens is padded to a multiple of `pad_to`."""

    def __init__(self, decoder: OptDecoder, device: Device, kv: Tensor, pad_to: int) -> None:
        self._decoder = decoder
        self._device = device
        self._kv = kv
        self._pad_to = pad_to

    def run(self, chunks: list[Chunk]) -> Tensor:
        singles = [c for c in chunks if c.end - c.start == 1]
        # Prompts of one length are neighbours: they attend in one call.
        others = sorted((c for c in chunks if c.end - c.start > 1), key=lambda c: (c.start, c.end))
        ordered = [*singles, *others]
        logits = self._run(ordered, len(singles))
        completing = [c for c in ordered if c.completes]
        wanted = [c for c in chunks if c.completes]
        if completing == wanted:
            return logits
        row_of = {c: row for row, c in enumerate(completing)}
        return logits[[row_of[c] for c in wanted]]

    def _run(self, chunks: list[Chunk], singles: int) -> Tensor:
        """Single tokens come first -> logits of the completing chunks, in their order."""
        positions = [p for c in chunks for p in range(c.start, c.end)]
        ids = [token for c in chunks for token in c.sequence.tokens(c.start, c.end)]
        embeddings: Tensor = self._decoder.embed_tokens(self._indices(ids))
        insert_images(embeddings, chunks, self._device)
        completing = last_tokens(chunks)
        hidden = self._decoder(
            embeddings,
            self._indices(positions),
            self._attention(chunks, singles),
            self._device.add_norm,
            self._indices(completing),
        )
        return self._decoder.logits(hidden)[: len(completing)]

    def _attention(self, chunks: list[Chunk], singles: int) -> Attend:
        kv, device = self._kv, self._device
        parts: list[tuple[int, Attend]] = []
        if singles:
            inputs = device.upload(decode_inputs(chunks[:singles], device))
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
        padding = [0] * (-len(values) % self._pad_to)
        return self._device.upload(torch.tensor(values + padding, dtype=torch.int64))


def attend_parts(parts: list[tuple[int, Attend]]) -> Attend:
    """Joins consecutive parts of a step, (tokens, how they attend); padding behind gets zeros."""
    together: Tensor | None = None  # reused by all layers

    def attend(layer: int, qkv: Tensor) -> Tensor:
        nonlocal together
        if [count for count, _ in parts] == [len(qkv)]:
            return parts[0][1](layer, qkv)
        if together is None:
            together = torch.zeros_like(qkv[:, 0])
        offset = 0
        for count, part in parts:
            own = slice(offset, offset + count)
            together[own] = part(layer, qkv[own])
            offset += count
        return together

    return attend


def decode_inputs(chunks: list[Chunk], device: Device, pad_to: int = 1) -> Tensor:
    """The input of a `DecodeStep`, in main memory; the rows are padded to a multiple."""
    width = max(c.end for c in chunks)
    gaps = [array("q", bytes(8 * gap)) for gap in range(1 + width - min(c.end for c in chunks))]
    flat = array("q")
    for chunk in chunks:  # by arrays: numpy takes several times as long for so few numbers
        sequence = chunk.sequence
        flat.append(sequence.token_at(chunk.start))
        flat.append(chunk.start)
        flat += sequence.slots[: chunk.end]
        flat += gaps[width - chunk.end]
    flat.frombytes(bytes(8 * (-len(chunks) % pad_to) * (2 + width)))
    inputs = device.host_tensor((len(flat) // (2 + width), 2 + width), torch.int64)
    inputs.numpy().reshape(-1)[:] = np.frombuffer(flat, np.int64)
    return inputs


def insert_images(embeddings: Tensor, chunks: list[Chunk], device: Device) -> None:
    """Overwrites the embeddings of image tokens, [tokens, hidden], with the image features."""
    offset = 0
    for chunk in chunks:
        image = chunk.sequence.request.image[chunk.start : chunk.end]  # empty past its tokens
        if len(image):
            embeddings[offset : offset + len(image)] = device.upload(image)
        offset += chunk.end - chunk.start


def last_tokens(chunks: list[Chunk]) -> list[int]:
    """Where the step has the last token of each completing chunk."""
    ends = itertools.accumulate(c.end - c.start for c in chunks)
    return [end - 1 for c, end in zip(chunks, ends, strict=True) if c.completes]
