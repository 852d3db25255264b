"""Runs the decoder over one step's chunks and keeps the keys and values.

The only module that knows how the KV lies in memory. It knows nothing of sampling or of why these
chunks were chosen.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from blip2_serve.engine import attention
from blip2_serve.engine.graphs import DecodeGraphs, cuda_recorder, no_recorder
from blip2_serve.engine.sequence import Chunk
from blip2_serve.engine.slots import DecodeSlots
from blip2_serve.model.linear import ROW_MULTIPLE, PackedLinear
from blip2_serve.model.opt import Attend, OptDecoder
from blip2_serve.model.transfer import pinned, upload


class Runner:
    """A decoder with a KV of `rows` rows.

    `slots` sequences of up to `columns` tokens decode together in one attention call, all others
    in one each; a slot's column takes as much memory as a row.

    On a GPU, what counts is the number of kernels: steps that only decode are CUDA graphs, and
    attention is one kernel (DESIGN.md counts them). `gpu` asks for that, by default where the
    decoder is on one; tests ask for it on a CPU, where nothing is recorded.
    """

    def __init__(
        self,
        decoder: OptDecoder,
        rows: int,
        *,
        slots: int = 0,
        columns: int = 0,
        gpu: bool | None = None,
    ) -> None:
        self._decoder = decoder
        weight = decoder.embed_tokens.weight
        config = decoder.config
        packed = any(isinstance(module, PackedLinear) for module in decoder.modules())
        self._row_multiple = ROW_MULTIPLE if packed else 1
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        dim = config.hidden_size // heads
        self._device = weight.device
        # Not zeroed: memory that no sequence has reached yet is never touched. Rows count from 1.
        shape = (layers, rows + 1, 2, heads, dim)
        self._rows = torch.empty(shape, dtype=weight.dtype, device=self._device)
        on_gpu = self._device.type == "cuda"
        self._gpu = on_gpu if gpu is None else gpu
        self._slots = DecodeSlots(
            (layers, slots, heads, columns, dim), weight.dtype, self._device, fixed=self._gpu
        )
        if on_gpu:
            # cuDNN's attention makes a plan for each new shape, and prompts come in any length.
            # torch has this switch for the whole process only.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.graphs: DecodeGraphs | None = None
        if self._gpu and slots and columns:
            self.graphs = DecodeGraphs(
                self._decode_step,
                slots=slots,
                columns=columns,
                vocabulary=config.vocab_size,
                device=self._device,
                record=cuda_recorder() if on_gpu else no_recorder,
            )

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> Tensor:
        """Computes all chunks -> float32 logits [n, vocabulary], one row per completing chunk.

        They are good until the next run.
        """
        short = [c for c in chunks if c.sequence.output and self._slots.takes(c)]
        in_slots = self._slots.place(short[: self._slots.slots], self._rows)
        if len(in_slots) == len(chunks):
            ordered, logits = in_slots, self._decode(in_slots)
        else:
            placed = {*in_slots}
            others = (c for c in chunks if c not in placed)
            # Prompts of one length together: they attend in one call.
            ordered = [*in_slots, *sorted(others, key=lambda c: (c.start, c.end))]
            logits = self._compute(ordered, len(in_slots))
        completing = [c for c in ordered if c.completes]
        wanted = [c for c in chunks if c.completes]
        if completing == wanted:
            return logits
        row_of = {c: row for row, c in enumerate(completing)}
        return logits[[row_of[c] for c in wanted]]

    def _decode(self, chunks: list[Chunk]) -> Tensor:
        """One token of each sequence, all in slots -> their logits, in the same order."""
        ids = [c.sequence.token_at(c.start) for c in chunks]
        starts = [c.start for c in chunks]
        rows = [c.sequence.table[c.start] for c in chunks]
        if self.graphs:
            return self.graphs.run(ids, starts, rows, max(starts) + 1)
        return self._compute(chunks, len(chunks))

    def _decode_step(self, ids: Tensor, starts: Tensor, rows: Tensor, width: int) -> Tensor:
        """All of a decode step that happens on a GPU; arguments but `width` are [slots]."""
        slots = self._slots.blocks[0].kv
        attend = attention.fused(slots, starts, width, self._rows, rows)
        hidden = self._decoder(self._decoder.embed_tokens(ids), starts, attend)
        return self._decoder.logits(hidden)

    def _compute(self, chunks: list[Chunk], in_slots: int) -> Tensor:
        """Any mixture, those in slots first -> logits of the completing ones, in the same order."""
        hidden = self._decoder(
            self._embed(chunks), self._positions(chunks), self._attention(chunks, in_slots)
        )
        ends = itertools.accumulate(c.end - c.start for c in chunks)
        completing = [end - 1 for c, end in zip(chunks, ends, strict=True) if c.completes]
        logits = self._decoder.logits(hidden[self._tensor(self._padded(completing))])
        return logits[: len(completing)]

    def _positions(self, chunks: list[Chunk]) -> Tensor:
        return self._tensor(self._padded([p for c in chunks for p in range(c.start, c.end)]))

    def _embed(self, chunks: list[Chunk]) -> Tensor:
        ids = [c.sequence.token_at(p) for c in chunks for p in range(c.start, c.end)]
        embeddings: Tensor = self._decoder.embed_tokens(self._tensor(self._padded(ids)))
        offset = 0
        for chunk in chunks:
            image = chunk.sequence.request.image[chunk.start : chunk.end]  # empty past its tokens
            if len(image):
                place = embeddings[offset : offset + len(image)]
                place.copy_(pinned(image, self._device), non_blocking=True)
            offset += chunk.end - chunk.start
        return embeddings

    def _attention(self, chunks: list[Chunk], in_slots: int) -> Attend:
        parts: list[tuple[int, Attend]] = []
        if in_slots:
            parts.append((in_slots, self._slot_attention(chunks[:in_slots])))
        for (start, end), alike in itertools.groupby(
            chunks[in_slots:], key=lambda c: (c.start, c.end)
        ):
            tables = [c.sequence.table[:end] for c in alike]
            if start == 0:
                rows = self._tensor([row for table in tables for row in table])
                parts.append((len(rows), attention.beginnings(len(tables), self._rows, rows)))
            else:
                parts += [
                    (end - start, attention.continuation(start, self._rows, self._tensor(table)))
                    for table in tables
                ]
        return attention.joined(parts)

    def _slot_attention(self, chunks: list[Chunk]) -> Attend:
        starts = [c.start for c in chunks]
        rows = self._tensor([c.sequence.table[c.start] for c in chunks])
        blocks = [block for block in self._slots.blocks if block.count]
        if self._gpu:
            width = max(starts) + 1
            return attention.fused(blocks[0].kv, self._tensor(starts), width, self._rows, rows)
        return attention.over_blocks(blocks, starts, self._rows, rows)

    def _padded(self, values: list[int]) -> list[int]:
        """With zeros at the end, up to a number of rows that linear layers are fast for."""
        return values + [0] * (-len(values) % self._row_multiple)

    def _tensor(self, values: Any) -> Tensor:
        """Integers on the device."""
        return upload(torch.tensor(values, dtype=torch.int64), self._device)


def row_bytes(decoder: OptDecoder) -> int:
    """Bytes of one KV row: a token's keys and values of all layers."""
    config = decoder.config
    element = decoder.embed_tokens.weight.element_size()
    return int(2 * config.num_hidden_layers * config.hidden_size * element)
