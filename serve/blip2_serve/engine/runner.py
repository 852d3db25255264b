"""Runs the decoder over one step's chunks and keeps the keys and values.

The only module that knows how the KV lies in memory. It knows nothing of sampling or of why these
chunks were chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from blip2_serve.engine.sequence import Chunk
from blip2_serve.engine.slots import DecodeSlots
from blip2_serve.model.opt import Attend, OptDecoder


class Runner:
    """A decoder with a KV of `rows` rows.

    `slots` sequences of up to `columns` tokens decode together in one attention call, all others
    in one each; a slot's column takes as much memory as a row.
    """

    def __init__(self, decoder: OptDecoder, rows: int, *, slots: int = 0, columns: int = 0) -> None:
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
        self._slots = DecodeSlots((layers, slots, heads, columns, dim), weight.dtype, self._device)

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> Tensor:
        """Computes all chunks -> float32 logits [n, vocabulary], one row per completing chunk."""
        short = [c for c in chunks if c.sequence.output and self._slots.takes(c)]
        in_slots = self._slots.place(short[: self._slots.slots], self._keys, self._values)
        if len(in_slots) == len(chunks):
            ordered, logits = in_slots, self._decode(in_slots)
        else:
            placed = {*in_slots}
            ordered = [*in_slots, *(c for c in chunks if c not in placed)]
            logits = self._compute(ordered, len(in_slots))
        completing = [c for c in ordered if c.completes]
        wanted = [c for c in chunks if c.completes]
        if completing == wanted:
            return logits
        row_of = {c: row for row, c in enumerate(completing)}
        return logits[[row_of[c] for c in wanted]]

    def _decode(self, chunks: list[Chunk]) -> Tensor:
        """One token of each sequence, all in slots -> their logits, in the same order."""
        ids, starts, rows = (
            torch.tensor(column, device=self._device)
            for column in zip(
                *(
                    (c.sequence.token_at(c.start), c.start, c.sequence.table[c.start])
                    for c in chunks
                ),
                strict=True,
            )
        )
        return self._decode_step(ids, starts, rows, max(c.end for c in chunks))

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
        return self._decoder.logits(hidden[completing.to(self._device)])

    def _positions(self, chunks: list[Chunk]) -> Tensor:
        return torch.tensor([p for c in chunks for p in range(c.start, c.end)], device=self._device)

    def _embed(self, chunks: list[Chunk]) -> Tensor:
        ids = [c.sequence.token_at(p) for c in chunks for p in range(c.start, c.end)]
        embeddings: Tensor = self._decoder.embed_tokens(torch.tensor(ids, device=self._device))
        offset = 0
        for chunk in chunks:
            image = chunk.sequence.request.image[chunk.start : chunk.end]  # empty past its tokens
            embeddings[offset : offset + len(image)] = image
            offset += chunk.end - chunk.start
        return embeddings

    def _attention(self, chunks: list[Chunk], in_slots: int) -> Attend:
        parts: list[tuple[int, Attend]] = []
        if in_slots:
            starts = torch.tensor([c.start for c in chunks[:in_slots]], device=self._device)
            rows = [c.sequence.table[c.start] for c in chunks[:in_slots]]
            width = max(c.end for c in chunks[:in_slots])
            attend_slots = self._attend_slots(
                starts, torch.tensor(rows, device=self._device), width
            )
            parts.append((in_slots, attend_slots))
        parts += [(c.end - c.start, self._attend_rows(c)) for c in chunks[in_slots:]]

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
        """One token of each of the first slots, by two matrix products and a float32 softmax.

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

    def _attend_rows(self, chunk: Chunk) -> Attend:
        """Several tokens of one sequence, each looking at those up to its own."""
        table = torch.tensor(chunk.sequence.table[: chunk.end], device=self._device)
        own = table[chunk.start :]
        positions = torch.arange(chunk.start, chunk.end, device=self._device)
        mask = torch.arange(chunk.end, device=self._device) <= positions[:, None]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self._keys[layer][own], self._values[layer][own] = key, value
            if chunk.start > 0:
                key = self._keys[layer].index_select(0, table)
                value = self._values[layer].index_select(0, table)
            q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
            if chunk.start > 0:
                y = scaled_dot_product_attention(q, k, v, attn_mask=mask)
            else:
                y = scaled_dot_product_attention(q, k, v, is_causal=True)
            return y[0].transpose(0, 1)

        return attend


def row_bytes(decoder: OptDecoder) -> int:
    """Bytes of one KV row: a token's keys and values of all layers."""
    config = decoder.config
    element = decoder.embed_tokens.weight.element_size()
    return int(2 * config.num_hidden_layers * config.hidden_size * element)
