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
from blip2_serve.model.linear import ROW_MULTIPLE, OneDnnLinear
from blip2_serve.model.opt import Attend, OptDecoder
from blip2_serve.model.transfer import pinned, upload


class Runner:
    """A decoder with a KV of `rows` rows.

    On a CPU, single tokens of any number of sequences attend in one call, over the rows as they
    lie. On a GPU, what counts is the number of kernels: steps that only decode are CUDA graphs,
    and attention is one kernel (DESIGN.md counts them). It reads `slots` sequences of up to
    `columns` tokens, each in a piece of its own; a column takes as much memory as a row. `gpu`
    asks for that, by default where the decoder is on one; tests ask for it on a CPU, where
    nothing is recorded.
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
        in_fours = any(isinstance(module, OneDnnLinear) for module in decoder.modules())
        self._row_multiple = ROW_MULTIPLE if in_fours else 1
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        dim = config.hidden_size // heads
        self._device = weight.device
        on_gpu = self._device.type == "cuda"
        # Rows count from 1. Zeroed, so that memory is there from now on: pages that are taken when
        # a row is first used take longer than the row's attention, and may be missing by then.
        shape = (layers, 2, rows + 1, heads, dim)
        self._rows = torch.zeros(shape, dtype=weight.dtype, device=self._device)
        self._slots: DecodeSlots | None = None
        self.graphs: DecodeGraphs | None = None
        if not (on_gpu if gpu is None else gpu):
            # Here, on the only CPU path, so that GPUs need no compiler for CPUs.
            from blip2_serve.kernels import paged_attention

            paged_attention.kernel(weight.dtype, dim)  # or the first request would wait for it
            self._last_tokens = paged_attention.last_tokens
            return
        if on_gpu:
            # cuDNN's attention makes a plan for each new shape, and prompts come in any length.
            # torch has this switch for the whole process only.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self._slots = DecodeSlots((layers, slots, heads, columns, dim), weight.dtype, self._device)
        if slots and columns:
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
        singles = [c for c in chunks if c.end - c.start == 1]
        if self._slots:
            singles = self._slots.place(singles, self._rows)
        if self.graphs and len(singles) == len(chunks):
            ordered, logits = singles, self._replay(self.graphs, singles)
        else:
            placed = {*singles}
            others = (c for c in chunks if c not in placed)
            # Prompts of one length together: they attend in one call.
            ordered = [*singles, *sorted(others, key=lambda c: (c.start, c.end))]
            logits = self._compute(ordered, len(singles))
        completing = [c for c in ordered if c.completes]
        wanted = [c for c in chunks if c.completes]
        if completing == wanted:
            return logits
        row_of = {c: row for row, c in enumerate(completing)}
        return logits[[row_of[c] for c in wanted]]

    def _replay(self, graphs: DecodeGraphs, chunks: list[Chunk]) -> Tensor:
        """One token of each sequence, all in slots -> their logits, in the same order."""
        ids = [c.sequence.token_at(c.start) for c in chunks]
        starts = [c.start for c in chunks]
        rows = [c.sequence.table[c.start] for c in chunks]
        return graphs.run(ids, starts, rows, max(starts) + 1)

    def _decode_step(self, ids: Tensor, starts: Tensor, rows: Tensor, width: int) -> Tensor:
        """All of a decode step that happens on a GPU; arguments but `width` are [slots]."""
        assert self._slots
        attend = attention.fused(self._slots.kv, starts, width, self._rows, rows)
        hidden = self._decoder(self._decoder.embed_tokens(ids), starts, attend)
        return self._decoder.logits(hidden)

    def _compute(self, chunks: list[Chunk], singles: int) -> Tensor:
        """Any mixture, singles first -> logits of the completing ones, in the same order."""
        hidden = self._decoder(
            self._embed(chunks), self._positions(chunks), self._attention(chunks, singles)
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

    def _attention(self, chunks: list[Chunk], singles: int) -> Attend:
        parts: list[tuple[int, Attend]] = []
        if singles:
            parts.append((singles, self._single_tokens(chunks[:singles])))
        for (start, end), alike in itertools.groupby(
            chunks[singles:], key=lambda c: (c.start, c.end)
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

    def _single_tokens(self, chunks: list[Chunk]) -> Attend:
        if self._slots is None:
            return self._last_tokens([c.sequence.table[: c.end] for c in chunks], self._rows)
        starts = [c.start for c in chunks]
        rows = self._tensor([c.sequence.table[c.start] for c in chunks])
        return attention.fused(
            self._slots.kv, self._tensor(starts), max(starts) + 1, self._rows, rows
        )

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
