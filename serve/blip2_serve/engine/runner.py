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
        # Not zeroed: memory that no sequence has reached yet is never touched.
        shape = (layers, rows + 1, heads, dim)
        self._keys = torch.empty(shape, dtype=weight.dtype, device=self._device)
        self._values = torch.empty(shape, dtype=weight.dtype, device=self._device)
        self._slots = DecodeSlots((layers, slots, heads, columns, dim), weight.dtype, self._device)

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> Tensor:
        """Computes all chunks -> float32 logits [n, vocabulary], one row per completing chunk."""
        short = [c for c in chunks if c.sequence.output and self._slots.takes(c)]
        in_slots = self._slots.place(short[: self._slots.slots], self._keys, self._values)
        placed = {*in_slots}
        ordered = [*in_slots, *(c for c in chunks if c not in placed)]
        hidden = self._decoder(
            self._embed(ordered), self._positions(ordered), self._attention(in_slots, ordered)
        )
        ends = torch.tensor([c.end - c.start for c in ordered]).cumsum(0) - 1
        end_of = dict(zip(ordered, ends.tolist(), strict=True))
        completing = torch.tensor([end_of[c] for c in chunks if c.completes], dtype=torch.int64)
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

    def _attention(self, in_slots: list[Chunk], chunks: list[Chunk]) -> Attend:
        """`chunks` are all of the step's, those `in_slots` first."""
        rows = [torch.tensor(c.sequence.table[: c.end]) for c in chunks]
        written = torch.cat([r[c.start :] for r, c in zip(rows, chunks, strict=True)])
        written = written.to(self._device)
        parts: list[tuple[int, Attend]] = []
        if in_slots:
            parts.append((len(in_slots), self._attend_slots(in_slots)))
        for chunk, table in list(zip(chunks, rows, strict=True))[len(in_slots) :]:
            parts.append((chunk.end - chunk.start, self._attend_rows(chunk, table)))

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self._keys[layer][written] = key
            self._values[layer][written] = value
            outputs = []
            offset = 0
            for count, part in parts:
                own = slice(offset, offset + count)
                outputs.append(part(layer, query[own], key[own], value[own]))
                offset += count
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

        return attend

    def _attend_slots(self, chunks: list[Chunk]) -> Attend:
        """One token of each sequence, by two matrix products and a float32 softmax.

        For a single query, torch's fused attention takes twice as long on a CPU, and so does
        the first product the other way round (DESIGN.md).
        """
        count, width = len(chunks), max(c.end for c in chunks)
        ends = torch.tensor([c.end for c in chunks])
        hidden = torch.arange(width) >= ends[:, None]
        bias = torch.zeros(count, 1, width).masked_fill_(hidden[:, None], -torch.inf)
        bias = bias.to(self._device)
        slot, column = torch.arange(count, device=self._device), (ends - 1).to(self._device)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self._slots.keys[layer, :count], self._slots.values[layer, :count]
            keys[slot, :, column], values[slot, :, column] = key, value
            scores = (keys[:, :, :width] @ query[..., None])[..., 0]
            weights = torch.add(bias, scores, alpha=query.shape[-1] ** -0.5).softmax(-1)
            attended = weights.to(value.dtype)[:, :, None] @ values[:, :, :width]
            return attended[:, :, 0]

        return attend

    def _attend_rows(self, chunk: Chunk, table: Tensor) -> Attend:
        """Several tokens of one sequence, each looking at those up to its own."""
        table = table.to(self._device)
        positions = torch.arange(chunk.start, chunk.end, device=self._device)
        mask = torch.arange(chunk.end, device=self._device) <= positions[:, None]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
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
