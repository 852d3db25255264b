"""Keys and values of the decoding sequences on a GPU, each sequence's in one piece.

What is in the KV's rows, copied once when a sequence begins to decode and then written token by
token beside them: torch's fused attention takes no table of rows. A slot belongs to a `Sequence`
object, whose tokens only ever grow; a fork gets a slot of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from blip2_serve.engine.sequence import Chunk, Sequence


class DecodeSlots:
    """`kv` is [layers, 2 (keys, values), slots, heads, columns, head_dim]; column = position.

    It stays where it is, as CUDA graphs want it. Columns that were never written are zero:
    attention multiplies them by zero, which would not do for whatever else was in memory.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`shape` is (layers, slots, heads, columns, head_dim)."""
        layers, self.slots, heads, self.columns, dim = shape
        self.kv = torch.zeros(
            (layers, 2, self.slots, heads, self.columns, dim), dtype=dtype, device=device
        )
        self._owners: list[Sequence | None] = [None] * self.slots
        self._filled = [0] * self.slots

    def place(self, chunks: list[Chunk], rows: Tensor) -> list[Chunk]:
        """Those chunks that can have a slot, in the order of their slots, which are the first.

        They are single tokens of sequences that are short enough, as many as there are slots. All
        but each chunk's own column is filled, at need from the KV's `rows`, which are
        [layers, 2, rows, heads, head_dim].
        """
        chunks = [c for c in chunks if c.sequence.output and c.end <= self.columns][: self.slots]
        count = len(chunks)
        held = {
            owner: slot
            for slot, owner in enumerate(self._owners)
            if owner is not None and self._filled[slot] == owner.length - 1
        }
        placed: list[Chunk | None] = [None] * count
        homeless = []
        for chunk in chunks:
            slot = held.get(chunk.sequence, count)
            if slot < count:
                placed[slot] = chunk
            else:
                homeless.append(chunk)
        free = [slot for slot, chunk in enumerate(placed) if chunk is None]
        for slot, chunk in zip(free, homeless, strict=True):
            placed[slot] = chunk
            # From a slot behind the first ones, which nobody else is filled into.
            self._fill(slot, chunk, held.get(chunk.sequence), rows)
        in_order = [chunk for chunk in placed if chunk is not None]
        others: Iterable[None] = (None for _ in range(self.slots - count))
        self._owners = [*(chunk.sequence for chunk in in_order), *others]
        self._filled[:count] = [chunk.end for chunk in in_order]
        return in_order

    def _fill(self, slot: int, chunk: Chunk, moved_from: int | None, rows: Tensor) -> None:
        own = self.kv[:, :, slot, :, : chunk.start]
        if moved_from is None:
            ids = torch.tensor(chunk.sequence.table[: chunk.start], device=rows.device)
            own.copy_(rows.index_select(2, ids).transpose(2, 3))
        else:
            own.copy_(self.kv[:, :, moved_from, :, : chunk.start])
