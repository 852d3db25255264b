"""Runs the decoder over one step's chunks and keeps the keys and values.

The only module that knows how the KV lies in memory. It knows nothing of sampling or of why these
chunks were chosen.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip2_serve.compute import attention
from blip2_serve.compute.cpu.linear import ROW_MULTIPLE, OneDnnLinear
from blip2_serve.compute.cuda.capture import cuda_recorder, no_recorder
from blip2_serve.compute.cuda.graphs import DecodeGraphs
from blip2_serve.compute.transfer import pinned, upload
from blip2_serve.engine.sequence import Chunk
from blip2_serve.model.decoder import AddNorm, Attend, OptDecoder, add_norm


class Runner:
    """A decoder with a KV of `rows` rows.

    Single tokens of any number of sequences attend in one call, over the rows as they lie: by one
    kernel on a CPU, by another on a GPU. There, steps that only decode, up to `sequences` sequences
    of up to `longest` tokens, are CUDA graphs. `gpu` asks for that, by default where the decoder is
    on one; tests ask for it on a CPU, where nothing is recorded.
    """

    def __init__(
        self,
        decoder: OptDecoder,
        rows: int,
        *,
        sequences: int = 0,
        longest: int = 0,
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
        self.graphs: DecodeGraphs | None = None
        self._gpu = on_gpu if gpu is None else gpu
        if not self._gpu:
            # Here, on the only CPU path, so that GPUs need no compiler for CPUs.
            from blip2_serve.compute.cpu import paged_attention

            paged_attention.kernel(weight.dtype, dim)  # or the first request would wait for it
            self._paged_attention = paged_attention.last_tokens
            return
        self._attend_last = attention.last_tokens
        self._add_norm: AddNorm = add_norm
        if on_gpu:
            # Triton's, which only comes with torch for GPUs.
            from blip2_serve.compute.cuda import add_norm as add_norm_kernel
            from blip2_serve.compute.cuda import decode_attention

            self._attend_last = decode_attention.last_tokens
            if config.do_layer_norm_before and config.layer_norm_elementwise_affine:
                self._add_norm = add_norm_kernel.add_norm
            # cuDNN's attention makes a plan for each new shape, and prompts come in any length.
            # torch has this switch for the whole process only.
            torch.backends.cuda.enable_cudnn_sdp(False)
        if sequences and longest:
            self.graphs = DecodeGraphs(
                self._decode_step,
                sequences=sequences,
                columns=longest,
                vocabulary=config.vocab_size,
                device=self._device,
                record=cuda_recorder(priority=-1) if on_gpu else no_recorder,
            )

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> Tensor:
        """Computes all chunks -> float32 logits [n, vocabulary], one row per completing chunk.

        They are good until the next run.
        """
        if self.graphs and self._can_be_replayed(chunks, self.graphs):
            return self.graphs.run(self._decode_inputs(chunks))
        singles = [c for c in chunks if c.end - c.start == 1]
        # Prompts of one length together: they attend in one call.
        others = sorted((c for c in chunks if c.end - c.start > 1), key=lambda c: (c.start, c.end))
        ordered = [*singles, *others]
        logits = self._compute(ordered, len(singles))
        completing = [c for c in ordered if c.completes]
        wanted = [c for c in chunks if c.completes]
        if completing == wanted:
            return logits
        row_of = {c: row for row, c in enumerate(completing)}
        return logits[[row_of[c] for c in wanted]]

    def _can_be_replayed(self, chunks: list[Chunk], graphs: DecodeGraphs) -> bool:
        return len(chunks) <= graphs.sequences and all(
            c.sequence.output and c.end - c.start == 1 and c.end <= graphs.columns for c in chunks
        )

    def _decode_step(self, inputs: Tensor) -> Tensor:
        """All of a decode step that happens on a GPU; `inputs` as in `DecodeGraphs.run`."""
        ids, starts, tables = inputs[:, 0], inputs[:, 1], inputs[:, 2:]
        embeddings = self._decoder.embed_tokens(ids)
        attend = self._last_tokens(starts, tables)
        hidden = self._decoder(embeddings, starts, attend, self._add_norm)
        return self._decoder.logits(hidden)

    def _last_tokens(self, starts: Tensor, tables: Tensor) -> Attend:
        return lambda layer, qkv: self._attend_last(qkv, self._rows[layer], tables, starts)

    def _decode_inputs(self, chunks: list[Chunk]) -> Tensor:
        """int64 [n, 2 + longest] in main memory: of each one's token id, position and KV rows."""
        shape = (len(chunks), 2 + max(c.end for c in chunks))
        inputs = torch.empty(shape, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        lines = inputs.numpy()
        for line, chunk in zip(lines, chunks, strict=True):
            sequence, start = chunk.sequence, chunk.start
            line[0], line[1] = sequence.token_at(start), start
            line[2 : 3 + start] = np.frombuffer(sequence.slots, np.int64, 1 + start)
        return inputs

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
            tables = [c.sequence.slots[:end] for c in alike]
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
        if not self._gpu:
            return self._paged_attention([c.sequence.slots[: c.end] for c in chunks], self._rows)
        inputs = self._decode_inputs(chunks).to(self._device, non_blocking=True)
        return self._last_tokens(inputs[:, 1], inputs[:, 2:])

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
