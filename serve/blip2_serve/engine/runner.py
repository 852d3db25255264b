"""Runs the decoder over one step's chunks and keeps the keys and values.

The only module that knows how KV rows lie in memory. It knows nothing of sampling or of why these
chunks were chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from blip2_serve.engine.kv import PADDING_ROW
from blip2_serve.engine.sequence import Chunk
from blip2_serve.model.opt import OptDecoder


class Runner:
    """A decoder with a KV of `rows` rows (and the padding row)."""

    def __init__(self, decoder: OptDecoder, rows: int) -> None:
        self._decoder = decoder
        weight = decoder.embed_tokens.weight
        config = decoder.config
        heads = config.num_attention_heads
        shape = (config.num_hidden_layers, rows + 1, heads, config.hidden_size // heads)
        # Not zeroed: memory that no sequence has reached yet is never touched.
        self._keys = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self._values = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self._keys[:, PADDING_ROW] = 0
        self._values[:, PADDING_ROW] = 0

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> Tensor:
        """Computes all chunks -> float32 logits [n, vocabulary], one row per completing chunk.

        Chunks of one token that come first share one attention call: the scheduler puts decodes
        there. Each other chunk has a call of its own.
        """
        device = self._keys.device
        positions = torch.tensor([p for c in chunks for p in range(c.start, c.end)], device=device)
        attend = self._attention(chunks)
        hidden = self._decoder(self._embed(chunks), positions, attend)
        ends = torch.tensor([c.end - c.start for c in chunks]).cumsum(0) - 1
        sampled = ends[torch.tensor([c.completes for c in chunks], dtype=torch.bool)]
        return self._decoder.logits(hidden[sampled.to(device)])

    def _embed(self, chunks: list[Chunk]) -> Tensor:
        ids = [c.sequence.token_at(p) for c in chunks for p in range(c.start, c.end)]
        embeddings: Tensor = self._decoder.embed_tokens(torch.tensor(ids, device=self._keys.device))
        offset = 0
        for chunk in chunks:
            image = chunk.sequence.request.image[
                chunk.start : chunk.end
            ]  # empty past the image tokens
            embeddings[offset : offset + len(image)] = image
            offset += chunk.end - chunk.start
        return embeddings

    def _attention(self, chunks: list[Chunk]) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
        device = self._keys.device
        rows = [torch.tensor(c.sequence.table[: c.end]) for c in chunks]
        written = torch.cat([r[c.start :] for r, c in zip(rows, chunks, strict=True)]).to(device)
        single = sum(1 for _ in takewhile(lambda c: c.end - c.start == 1, chunks))
        decode = None
        if single:
            padded = pad_sequence(rows[:single], batch_first=True, padding_value=PADDING_ROW)
            lengths = torch.tensor([c.end for c in chunks[:single]])
            visible = torch.arange(padded.shape[1]) < lengths[:, None]
            decode = (padded.to(device), visible[:, None, None].to(device))
        prompts = [
            (r.to(device), _causal_mask(c, device))
            for r, c in zip(rows[single:], chunks[single:], strict=True)
        ]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self._keys[layer], self._values[layer]
            keys[written], values[written] = key, value
            parts = []
            if decode is not None:
                table, mask = decode
                k, v = (_gather(x, table).transpose(1, 2) for x in (keys, values))
                parts.append(_attend_one(query[:single, :, None], k, v, mask)[:, :, 0])
            offset = single
            for table, mask in prompts:
                count = mask.shape[0]
                q = query[offset : offset + count].transpose(0, 1)
                k, v = (_gather(x, table).transpose(0, 1) for x in (keys, values))
                y = scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)
                parts.append(y[0].transpose(0, 1))
                offset += count
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return attend


def row_bytes(decoder: OptDecoder) -> int:
    """Bytes of one KV row: a token's keys and values of all layers."""
    config = decoder.config
    element = decoder.embed_tokens.weight.element_size()
    return int(2 * config.num_hidden_layers * config.hidden_size * element)


def _gather(rows: Tensor, table: Tensor) -> Tensor:
    """[rows, heads, dim] by a table of row numbers of any shape -> [*table.shape, heads, dim]."""
    return rows.index_select(0, table.flatten()).view(*table.shape, *rows.shape[1:])


def _attend_one(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Attention of one query per sequence: [B, heads, 1, dim] over [B, heads, L, dim].

    Two matrix products and a float32 softmax: for a single query, torch's fused attention takes
    twice as long on a CPU (DESIGN.md).
    """
    scores = (query @ key.transpose(2, 3)).float() * query.shape[-1] ** -0.5
    weights = scores.masked_fill_(~visible, -torch.inf).softmax(-1)
    attended: Tensor = weights.to(value.dtype) @ value
    return attended


def _causal_mask(chunk: Chunk, device: torch.device) -> Tensor:
    """True where the chunk's token i (position start + i) may look: positions up to its own."""
    positions = torch.arange(chunk.start, chunk.end, device=device)
    return torch.arange(chunk.end, device=device) <= positions[:, None]
