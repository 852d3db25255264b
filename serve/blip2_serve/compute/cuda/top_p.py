"""What top_p keeps of each row of scores, without a sort, written in Triton.

Each program finds the lowest score that stays in its row, by bits: the integers that order like
floats are halved, four parts at a time, until one is left. It reads a row of OPT's vocabulary
19 times, from the L2 cache, which takes less than half as long as sorting it
(docs/lab/2026-11-gpu.md).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 2048, 16


def keep_top_p(weights: Tensor, scores: Tensor, top_p: Tensor) -> Tensor:
    """`drawing.keep_top_p`, in place."""
    rows, width = scores.shape
    _kernel[(rows,)](
        weights, scores.contiguous(), top_p.contiguous(), width, block=BLOCK, num_warps=WARPS
    )
    return weights


def _ordered(x):  # type: ignore[no-untyped-def]  # Triton reads annotations
    """Integers in the order of floats, as int64."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


_order = triton.jit(_ordered)


def _keep(weights, scores, top_p, width, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    weights += row * width
    scores += row * width
    columns = tl.arange(0, block)
    sums = tl.zeros((block,), tl.int64)
    for start in range(0, width, block):
        sums += tl.load(weights + start + columns, start + columns < width, 0)
    # A token stays if those before it sum to less than this; the likeliest always stays.
    exact = tl.load(top_p + row) * tl.sum(sums).to(tl.float64)
    mass = exact.to(tl.int64)
    mass += (mass.to(tl.float64) < exact).to(tl.int64)
    mass = tl.maximum(mass, 1)
    # The largest integer at and above which tokens sum to as much: the lowest score that stays.
    low = tl.full((), -2147483648, tl.int64)
    step = tl.full((), 1 << 30, tl.int64)
    for _ in range(16):
        above1 = tl.zeros((block,), tl.int64)
        above2 = tl.zeros((block,), tl.int64)
        above3 = tl.zeros((block,), tl.int64)
        for start in range(0, width, block):
            inside = start + columns < width
            weight = tl.load(weights + start + columns, inside, 0)
            distance = _order(tl.load(scores + start + columns, inside, 0.0)) - low
            above1 += tl.where(distance >= step, weight, 0)
            above2 += tl.where(distance >= 2 * step, weight, 0)
            above3 += tl.where(distance >= 3 * step, weight, 0)
        steps = (tl.sum(above1) >= mass).to(tl.int64) + (tl.sum(above2) >= mass).to(tl.int64)
        low += step * (steps + (tl.sum(above3) >= mass).to(tl.int64))
        step = step >> 2
    # Of tokens with that score, those with the lowest ids stay.
    before = tl.zeros((block,), tl.int64)
    each = tl.zeros((block,), tl.int64)
    for start in range(0, width, block):
        inside = start + columns < width
        weight = tl.load(weights + start + columns, inside, 0)
        place = _order(tl.load(scores + start + columns, inside, 0.0))
        before += tl.where(place > low, weight, 0)
        each = tl.maximum(each, tl.where(place == low, weight, 0))
    staying = (mass - 1 - tl.sum(before)) // tl.maximum(tl.max(each), 1) + 1
    earlier = tl.zeros((), tl.int64)
    for start in range(0, width, block):
        inside = start + columns < width
        place = _order(tl.load(scores + start + columns, inside, 0.0))
        equal = (inside & (place == low)).to(tl.int64)
        rank = earlier + tl.cumsum(equal)
        drop = inside & ((place < low) | ((equal > 0) & (rank > staying)))
        tl.store(weights + start + columns, tl.zeros((block,), tl.int64), drop)
        earlier += tl.sum(equal)


_kernel = triton.jit(_keep)
