"""Keys and values of the decoding sequences, each sequence's in few pieces.

What is in the KV's rows, copied once when a sequence begins to decode and then written token by
token beside them: gathering the rows in every step costs more than attention itself. A slot
belongs to a `Sequence` object, whose tokens only ever grow; a fork gets a slot of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blip2_serve.engine.sequence import Chunk, Sequence

FIRST_BLOCK = 96  # columns: an image, a question and a short answer


@dataclass
class Block:
    """Some columns, from `start` on, of the first `count` slots.

    `kv` is [layers, 2 (keys, values), slots, heads, columns, head_dim].
    """

    start: int
    kv: Tensor
    count: int = 0

    @property
    def end(self) -> int:
        return self.start + self.kv.shape[4]


class DecodeSlots:
    """Columns are positions, and come in blocks, each as wide as all those before it.

    Sequences lie in the order of the number of blocks that they reach into, the most first. So
    each block is needed for its first few slots only: a step reads at most twice the columns that
    a sequence has, however long another one is. A block is there from its first use, with as many
    slots as ever needed it.

    CUDA graphs want everything where it was: with `fixed`, one block has all slots and columns.

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
        """`shape` is (layers, slots, heads, columns, head_dim)."""
        self._layers, self.slots, self._heads, self.columns, self._dim = shape
        self._dtype, self._device = dtype, device
        first = self.columns if fixed else min(FIRST_BLOCK, self.columns)
        self._ends = [first]
        while self._ends[-1] < self.columns:
            self._ends.append(min(2 * self._ends[-1], self.columns))
        self.blocks: list[Block] = []
        if fixed:
            self._fit([self.slots])
        self._owners: list[Sequence | None] = [None] * self.slots
        self._filled = [0] * self.slots

    def takes(self, chunk: Chunk) -> bool:
        """Whether this is one token of a sequence that is short enough."""
        return chunk.end - chunk.start == 1 and chunk.end <= self.columns

    def place(self, chunks: list[Chunk], rows: Tensor) -> list[Chunk]:
        """The chunks in the order of their slots, which are the first len(chunks).

        All but each chunk's own column is filled, at need from the KV's `rows`, which are
        [layers, rows, 2, heads, head_dim].
        """
        reach = {chunk: self._reach(chunk.end) for chunk in chunks}
        counts = [sum(r > block for r in reach.values()) for block in range(len(self._ends))]
        self._fit(counts)
        held = {
            owner: slot
            for slot, owner in enumerate(self._owners)
            if owner is not None and self._filled[slot] == owner.length - 1
        }
        placed: list[Chunk | None] = [None] * len(chunks)
        homeless = []
        for chunk in chunks:
            slot = held.get(chunk.sequence, len(chunks))
            shorter, longer = counts[reach[chunk] - 1], [*counts, 0][reach[chunk]]
            if longer <= slot < shorter:
                placed[slot] = chunk
            else:
                homeless.append(chunk)
        homeless.sort(key=lambda chunk: -reach[chunk])
        free = [slot for slot, chunk in enumerate(placed) if chunk is None]
        # All are read before any is written: one may take the slot of another.
        contents = [self._contents(c, held.get(c.sequence), rows) for c in homeless]
        for slot, chunk, content in zip(free, homeless, contents, strict=True):
            placed[slot] = chunk
            self._write(slot, content)
        in_order = [chunk for chunk in placed if chunk is not None]
        others: Iterable[None] = (None for _ in range(self.slots - len(chunks)))
        self._owners = [*(chunk.sequence for chunk in in_order), *others]
        self._filled[: len(chunks)] = [chunk.end for chunk in in_order]
        return in_order

    def _reach(self, length: int) -> int:
        """How many blocks so many columns reach into."""
        return 1 + sum(length > end for end in self._ends)

    def _fit(self, counts: list[int]) -> None:
        """Makes blocks, and slots of blocks, where there are too few."""
        for number, count in enumerate(counts):
            if number == len(self.blocks):
                self.blocks.append(
                    Block(self._ends[number - 1] if number else 0, self._zeros(0, number))
                )
            block = self.blocks[number]
            block.count = count
            slots = block.kv.shape[2]
            if count > slots:
                grown = self._zeros(min(1 << (count - 1).bit_length(), self.slots), number)
                grown[:, :, :slots] = block.kv
                block.kv = grown

    def _contents(self, chunk: Chunk, slot: int | None, rows: Tensor) -> Tensor:
        """[layers, 2, heads, chunk.start, head_dim], from another slot or from the KV's rows."""
        if slot is None:
            ids = torch.tensor(chunk.sequence.table[: chunk.start], device=rows.device)
            return rows.index_select(1, ids).permute(0, 2, 3, 1, 4)
        pieces = [
            block.kv[:, :, slot, :, : chunk.start - block.start]
            for block in self._blocks_with(chunk.start)
        ]
        return torch.cat(pieces, 3)

    def _write(self, slot: int, content: Tensor) -> None:
        for block in self._blocks_with(content.shape[3]):
            piece = content[:, :, :, block.start : block.end]
            block.kv[:, :, slot, :, : piece.shape[3]] = piece

    def _blocks_with(self, columns: int) -> list[Block]:
        """The blocks that some of the first `columns` are in."""
        return [block for block in self.blocks if block.start < columns]

    def _zeros(self, slots: int, number: int) -> Tensor:
        width = self._ends[number] - (self._ends[number - 1] if number else 0)
        shape = (self._layers, 2, slots, self._heads, width, self._dim)
        return untouched_zeros(shape, self._dtype, self._device)


def untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that, on a CPU, take no memory before they are written."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch's own zeros are written. numpy also asks for huge pages, which are touched sooner.
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
