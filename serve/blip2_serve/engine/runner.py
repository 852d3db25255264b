"""Runs the decoder over one step's chunks and keeps the keys and values.

The only module that knows how the KV lies in memory. It knows nothing of sampling or of why these
chunks were chosen.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from blip2_serve.engine.graphs import DecodeGraphs, cuda_recorder, no_recorder
from blip2_serve.engine.sequence import Chunk
from blip2_serve.engine.slots import DecodeSlots
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
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        dim = config.hidden_size // heads
        self._device = weight.device
        # Not zeroed: memory that no sequence has reached yet is never touched. Rows count from 1.
        shape = (layers, rows + 1, heads, dim)
        self._keys = torch.empty(shape, dtype=weight.dtype, device=self._device)
        self._values = torch.empty(shape, dtype=weight.dtype, device=self._device)
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
        in_slots = self._slots.place(short[: self._slots.slots], self._keys, self._values)
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
        width = self._width(chunks)
        if self.graphs:
            return self.graphs.run(ids, starts, rows, width)
        inputs = self._tensor([ids, starts, rows])
        return self._decode_step(inputs[0], inputs[1], inputs[2], width)

    def _decode_step(self, ids: Tensor, starts: Tensor, rows: Tensor, width: int) -> Tensor:
        """All of a decode step that happens on the device; arguments but `width` are [slots]."""
        attend = self._attend_slots(starts, rows, width)
        hidden = self._decoder(self._decoder.embed_tokens(ids), starts, attend)
        return self._decoder.logits(hidden)

    def _compute(self, chunks: list[Chunk], in_slots: int) -> Tensor:
        """Any mixture, those in slots first -> logits of the completing ones, in the same order."""
        hidden = self._decoder(
            self._embed(chunks), self._positions(chunks), self._attention(chunks, in_slots)
        )
        ends = torch.tensor([c.end - c.start for c in chunks]).cumsum(0) - 1
        completing = ends[torch.tensor([c.completes for c in chunks])]
        return self._decoder.logits(hidden[upload(completing, self._device)])

    def _width(self, in_slots: list[Chunk]) -> int:
        """How many columns a step has to read."""
        return max(c.end for c in in_slots) if self._gpu else self._slots.keys.shape[3]

    def _positions(self, chunks: list[Chunk]) -> Tensor:
        return self._tensor([p for c in chunks for p in range(c.start, c.end)])

    def _embed(self, chunks: list[Chunk]) -> Tensor:
        ids = [c.sequence.token_at(p) for c in chunks for p in range(c.start, c.end)]
        embeddings: Tensor = self._decoder.embed_tokens(self._tensor(ids))
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
            starts = self._tensor([c.start for c in chunks[:in_slots]])
            rows = self._tensor([c.sequence.table[c.start] for c in chunks[:in_slots]])
            width = self._width(chunks[:in_slots])
            parts.append((in_slots, self._attend_slots(starts, rows, width)))
        for (start, end), alike in groupby(chunks[in_slots:], key=lambda c: (c.start, c.end)):
            if start == 0:
                beginnings = list(alike)
                parts.append((len(beginnings) * end, self._attend_beginnings(beginnings, end)))
            else:
                parts += [(end - start, self._attend_rows(chunk)) for chunk in alike]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            outputs = []
            offset = 0
            for count, part in parts:
                own = slice(offset, offset + count)
                outputs.append(part(layer, query[own], key[own], value[own]))
                offset += count
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

        return attend

    def _attend_slots(self, starts: Tensor, rows: Tensor, width: int) -> Attend:
        """One token of each of the first slots, looking at its columns up to its own."""
        if self._gpu:
            return self._attend_slots_in_one(starts, rows, width)
        return self._attend_slots_by_products(starts, rows, width)

    def _attend_slots_by_products(self, starts: Tensor, rows: Tensor, width: int) -> Attend:
        """By two matrix products and a float32 softmax.

        For a single query, torch's fused attention takes twice as long on a CPU, and so does
        the first product the other way round (DESIGN.md).
        """
        count = len(starts)
        slot = torch.arange(count, device=self._device)
        hidden = torch.arange(width, device=self._device) > starts[:, None, None]
        bias = torch.zeros(hidden.shape, device=self._device).masked_fill_(hidden, -torch.inf)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self._keys[layer][rows], self._values[layer][rows] = key, value
            keys, values = self._slots.keys[layer, :count], self._slots.values[layer, :count]
            keys[slot, :, starts], values[slot, :, starts] = key, value
            scores = (keys[:, :, :width] @ query[..., None])[..., 0]
            weights = torch.add(bias, scores, alpha=query.shape[-1] ** -0.5).softmax(-1)
            attended = weights.to(value.dtype)[:, :, None] @ values[:, :, :width]
            return attended[:, :, 0]

        return attend

    def _attend_slots_in_one(self, starts: Tensor, rows: Tensor, width: int) -> Attend:
        """By torch's fused attention: three kernels a layer where the products take ten."""
        count, layers = len(starts), len(self._slots.keys)
        slot = torch.arange(count, device=self._device)
        hidden = torch.arange(width, device=self._device) > starts[:, None, None, None]
        bias = torch.zeros(hidden.shape, dtype=self._slots.keys.dtype, device=self._device)
        bias.masked_fill_(hidden, -torch.inf)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self._slots.keys[layer, :count], self._slots.values[layer, :count]
            keys[slot, :, starts], values[slot, :, starts] = key, value
            if layer == layers - 1:  # into the rows for all layers at once
                for kv, own in ((self._keys, self._slots.keys), (self._values, self._slots.values)):
                    kv[:, rows] = own[:, slot, :, starts].transpose(0, 1)
            attended = scaled_dot_product_attention(
                query[:, :, None], keys[:, :, :width], values[:, :, :width], attn_mask=bias
            )
            return attended[:, :, 0]

        return attend

    def _attend_beginnings(self, chunks: list[Chunk], length: int) -> Attend:
        """The first `length` tokens of several sequences, each looking at those up to its own."""
        rows = self._tensor([row for c in chunks for row in c.sequence.table[:length]])
        shape = (len(chunks), length)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self._keys[layer][rows], self._values[layer][rows] = key, value
            q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in (query, key, value))
            y = scaled_dot_product_attention(q, k, v, is_causal=True)
            return y.transpose(1, 2).flatten(0, 1)

        return attend

    def _attend_rows(self, chunk: Chunk) -> Attend:
        """Later tokens of one sequence, each looking at those up to its own."""
        table = self._tensor(chunk.sequence.table[: chunk.end])
        own = table[chunk.start :]
        positions = torch.arange(chunk.start, chunk.end, device=self._device)
        mask = torch.arange(chunk.end, device=self._device) <= positions[:, None]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self._keys[layer][own], self._values[layer][own] = key, value
            key = self._keys[layer].index_select(0, table)
            value = self._values[layer].index_select(0, table)
            q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
            y = scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return y[0].transpose(0, 1)

        return attend

    def _tensor(self, values: Any) -> Tensor:
        """Integers on the device."""
        return upload(torch.tensor(values), self._device)


def row_bytes(decoder: OptDecoder) -> int:
    """Bytes of one KV row: a token's keys and values of all layers."""
    config = decoder.config
    element = decoder.embed_tokens.weight.element_size()
    return int(2 * config.num_hidden_layers * config.hidden_size * element)
