"""Steps with prefill as CUDA graphs: under load, most steps have a prompt among the decoding.

There is a graph for each of a list of token counts, and a step is padded to the next. Which chunks
the tokens belong to is read from GPU memory (`ragged_attention`). Steps with more tokens than that
run uncaptured: they keep a GPU busy for longer than Python takes to launch their kernels.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blip2_serve.compute.base import Device
from blip2_serve.compute.cuda import ragged_attention
from blip2_serve.compute.cuda.capture import Capture
from blip2_serve.compute.cuda.ragged_attention import BLOCK_FIELDS, QUERIES
from blip2_serve.compute.mixed import insert_images, last_tokens
from blip2_serve.engine.sequence import Chunk
from blip2_serve.model.decoder import OptDecoder

logger = logging.getLogger(__name__)

# Token counts with a graph: a product of more rows takes longer only by whole tiles.
SIZES = (16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024)


@dataclass(frozen=True)
class Layout:
    """Where the integers of a step of so many tokens lie in one int64 vector, padded with zeros."""

    tokens: int
    blocks: int
    logits: int

    @classmethod
    def of(cls, tokens: int, max_num_seqs: int) -> Layout:
        """Room for any chunks of `tokens` tokens."""
        chunks = min(tokens, max_num_seqs)
        return cls(tokens, chunks + tokens // QUERIES, chunks)

    @property
    def length(self) -> int:
        return 2 * self.tokens + BLOCK_FIELDS * self.blocks + self.logits

    def split(self, ints: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Token ids, positions, blocks [blocks, BLOCK_FIELDS], tokens whose logits are wanted."""
        parts = [self.tokens, self.tokens, BLOCK_FIELDS * self.blocks, self.logits]
        ids, positions, blocks, last = ints[: self.length].split(parts)
        return ids, positions, blocks.view(-1, BLOCK_FIELDS), last

    def write(self, chunks: list[Chunk], ints: Tensor) -> None:
        """Describes the chunks in a vector in main memory."""
        ints.zero_()
        ids, positions, blocks, last = (part.numpy() for part in self.split(ints))
        offset = 0
        for chunk in chunks:
            count = chunk.end - chunk.start
            own = slice(offset, offset + count)
            if count == 1:
                ids[offset] = chunk.sequence.token_at(chunk.start)
            else:
                ids[own] = chunk.sequence.tokens(chunk.start, chunk.end)
            positions[own] = np.arange(chunk.start, chunk.end)
            offset += count
        work = ragged_attention.blocks_of([(c.start, c.end) for c in chunks])
        blocks[: len(work)] = work
        wanted = last_tokens(chunks)
        last[: len(wanted)] = wanted


class MixedGraphs:
    """A `MixedStep`, captured for up to `max_num_batched_tokens` tokens, at most SIZES[-1]."""

    @torch.inference_mode()
    def __init__(
        self,
        decoder: OptDecoder,
        device: Device,
        kv: Tensor,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_len: int,
        capture: Capture,
    ) -> None:
        self._decoder, self._device, self._kv = decoder, device, kv
        self._max_num_seqs = max_num_seqs
        self._sizes = sizes(max_num_batched_tokens)
        most = Layout.of(self._sizes[-1], max_num_seqs)
        # All graphs read and write the same tensors: tensors of their own would have to be kept.
        place, hidden = device.place, decoder.config.hidden_size
        self._ints = torch.zeros(most.length, dtype=torch.int64, device=place)
        self._slots = torch.zeros((max_num_seqs, max_len), dtype=torch.int64, device=place)
        self._embeddings = torch.zeros((most.tokens, hidden), dtype=kv.dtype, device=place)
        self._logits = torch.empty((most.logits, decoder.config.vocab_size), device=place)

        def step_of(size: int) -> Callable[[], None]:
            layout = Layout.of(size, max_num_seqs)

            def run() -> None:
                embeddings = self._embeddings[:size]
                self._logits[: layout.logits] = self._step(
                    layout, embeddings, self._ints, self._slots
                )

            return run

        start = time.monotonic()
        # The largest first: the others fit into its memory.
        self._replays = {size: capture(step_of(size)) for size in reversed(self._sizes)}
        seconds = time.monotonic() - start
        logger.info("captured %d mixed steps in %.1f s", len(self._replays), seconds)

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> Tensor:
        """Logits of the completing chunks; the next run overwrites them."""
        tokens = sum(chunk.end - chunk.start for chunk in chunks)
        captured = tokens <= self._sizes[-1]
        size = self._sizes[bisect.bisect_left(self._sizes, tokens)] if captured else tokens
        layout = Layout.of(size, self._max_num_seqs)
        ints = self._device.host_tensor((layout.length,), torch.int64)
        layout.write(chunks, ints)
        slots = self._slot_tables(chunks)
        completing = sum(chunk.completes for chunk in chunks)
        if not captured:
            ints, slots = self._device.upload(ints), self._device.upload(slots)
            embeddings = self._decoder.embed_tokens(layout.split(ints)[0])
            insert_images(embeddings, chunks, self._device)
            return self._step(layout, embeddings, ints, slots)[:completing]
        self._ints[: layout.length].copy_(ints, non_blocking=True)
        self._slots[: len(slots), : slots.shape[1]].copy_(slots, non_blocking=True)
        embeddings = self._embeddings[:size]
        ids = layout.split(self._ints)[0]
        torch.index_select(self._decoder.embed_tokens.weight, 0, ids, out=embeddings)
        insert_images(embeddings, chunks, self._device)
        self._replays[size]()
        return self._logits[:completing]

    def _step(self, layout: Layout, embeddings: Tensor, ints: Tensor, slots: Tensor) -> Tensor:
        _, positions, blocks, last = layout.split(ints)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            return ragged_attention.attend(qkv, self._kv[layer], blocks, slots)

        hidden = self._decoder(embeddings, positions, attend, self._device.add_norm)
        return self._decoder.logits(hidden[last])

    def _slot_tables(self, chunks: list[Chunk]) -> Tensor:
        """int64 [chunks, longest] in main memory: the KV slots of each chunk's sequence."""
        tables = self._device.host_tensor((len(chunks), max(c.end for c in chunks)), torch.int64)
        for line, chunk in zip(tables.numpy(), chunks, strict=True):
            line[: chunk.end] = np.frombuffer(chunk.sequence.slots, np.int64, chunk.end)
        return tables


def sizes(max_num_batched_tokens: int) -> list[int]:
    """The token counts to capture."""
    most = min(SIZES[-1], max_num_batched_tokens)
    return [size for size in SIZES if size < most] + [most]
