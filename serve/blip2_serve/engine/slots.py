"""Keys and values of the decoding sequences, each sequence's in one piece.

What is in the KV's rows, copied once when a sequence begins to decode and then written token by
token beside them: gathering the rows in every step costs more than attention itself. A slot
belongs to a `Sequence` object, whose tokens only ever grow; a fork gets a slot of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from blip2_serve.engine.sequence import Chunk, Sequence

WIDTH_STEP = 32  # columns


class DecodeSlots:
    """`keys` and `values` are [layers, slots, heads, width, head_dim]; column = position.

    There are as many slots as decode, up to `slots`, and they are about as wide as the longest
    sequence, up to `columns`: torch's matrix product on a CPU first copies its argument if that is
    a part of each row. CUDA graphs want everything where it was, so with `fixed` all is there from
    the start.

    Columns that were never written are zero: attention multiplies them by zero, which would not
    do for whatever else was in memory.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        fixed: bool = False,
    ) -> None:
        self.slots, self.columns = shape[1], shape[3]
        self._fixed = fixed
        size = shape if fixed else (shape[0], 0, shape[2], 0, shape[4])
        self.keys, self.values = (_zeros(size, dtype, device) for _ in range(2))
        self._owners: list[Sequence | None] = [None] * self.slots
        self._filled = [0] * self.slots

    def takes(self, chunk: Chunk) -> bool:
        """Whether this is one token of a sequence that is short enough."""
        return chunk.end - chunk.start == 1 and chunk.end <= self.columns

    def place(self, chunks: list[Chunk], keys: Tensor, values: Tensor) -> list[Chunk]:
        """The chunks in the order of their slots, which are the first len(chunks).

        `keys` and `values` are the KV, [layers, rows, heads, head_dim].
        """
        count = len(chunks)
        if chunks and not self._fixed:
            self._fit(count, max(chunk.end for chunk in chunks))
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
        free = (slot for slot in range(count) if placed[slot] is None)
        for slot, chunk in zip(list(free), homeless, strict=True):
            placed[slot] = chunk
            self._fill(slot, chunk, held.get(chunk.sequence), keys, values)
        in_order = [chunk for chunk in placed if chunk is not None]
        others: Iterable[None] = (None for _ in range(self.slots - count))
        self._owners = [*(chunk.sequence for chunk in in_order), *others]
        self._filled[:count] = [chunk.end for chunk in in_order]
        return in_order

    def _fit(self, count: int, longest: int) -> None:
        """Makes enough slots, wide enough, and narrows them where they are far too wide."""
        slots, width = self.keys.shape[1], self.keys.shape[3]
        if count <= slots and longest <= width <= 2 * (longest + WIDTH_STEP):
            return
        # By more than is needed, since everything moves.
        slots = min(1 << (count - 1).bit_length(), self.slots)
        width = -(-(longest + longest // 8) // WIDTH_STEP) * WIDTH_STEP
        width = min(width, self.columns)
        self.keys, self.values = (_resized(old, slots, width) for old in (self.keys, self.values))
        self._owners[slots:] = [None] * (self.slots - slots)

    def _fill(
        self, slot: int, chunk: Chunk, moved_from: int | None, keys: Tensor, values: Tensor
    ) -> None:
        """Columns before the chunk's, from another slot or from the KV's rows."""
        if moved_from is None:
            rows = torch.tensor(chunk.sequence.table[: chunk.start], device=keys.device)
        for own, kv in ((self.keys, keys), (self.values, values)):
            if moved_from is None:
                own[:, slot, :, : chunk.start] = kv.index_select(1, rows).transpose(1, 2)
            else:
                own[:, slot, :, : chunk.start] = own[:, moved_from, :, : chunk.start]


def _resized(old: Tensor, slots: int, width: int) -> Tensor:
    layers, old_slots, heads, old_width, dim = old.shape
    new = _zeros((layers, slots, heads, width, dim), old.dtype, old.device)
    slots, width = min(slots, old_slots), min(width, old_width)
    new[:, :slots, :, :width] = old[:, :slots, :, :width]
    return new


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    size = int(np.prod(shape)) * dtype.itemsize
    if device.type != "cpu" or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    # Unlike torch's, numpy's zeros take no memory before they are written.
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
