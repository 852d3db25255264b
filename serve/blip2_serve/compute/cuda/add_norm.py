"""A sum and the layer norm of it as one kernel for a GPU, in Triton.

Of few rows, torch's two take 7 µs, three quarters of it the norm (DESIGN.md); a decode step has
64 of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

WARPS = 16


def add_norm(x: Tensor, more: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """x + more and its norm, all [rows, width]; `norm` has weight and bias. Sums are float32."""
    rows, width = x.shape
    total, normed = torch.empty_like(x), torch.empty_like(x)
    _kernel[(rows,)](
        total,
        normed,
        x,
        more,
        norm.weight,
        norm.bias,
        norm.eps,
        width=width,
        padded_width=triton.next_power_of_2(width),
        num_warps=WARPS,
    )
    return total, normed


def _add_and_normalise(  # type: ignore[no-untyped-def]  # Triton reads annotations
    total,
    normed,
    x,
    more,
    weight,
    bias,
    eps,
    width: tl.constexpr,
    padded_width: tl.constexpr,
):
    columns = tl.arange(0, padded_width)
    inside = columns < width
    places = tl.program_id(0).to(tl.int64) * width + columns
    # Rounded as torch rounds a sum before it norms it.
    added = tl.load(x + places, inside, 0).to(tl.float32) + tl.load(more + places, inside, 0)
    rounded = added.to(total.dtype.element_ty)
    tl.store(total + places, rounded, inside)
    values = rounded.to(tl.float32)
    centred = tl.where(inside, values - tl.sum(values) / width, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred) / width + eps)
    scaled = centred * scale * tl.load(weight + columns, inside, 0).to(tl.float32)
    tl.store(normed + places, scaled + tl.load(bias + columns, inside, 0), inside)


_kernel = triton.jit(_add_and_normalise)
