"""Adds two tensors and layer-normalises the sum in one GPU kernel, written in Triton.

For few rows, torch's two kernels take 7 µs together, three quarters of it in the norm,
and a decode step runs them 64 times (docs/lab/2026-11-gpu.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from blip2_serve.compute.cuda import overlap as overlapping


def warps(rows: int) -> int:
    """How many warps share a row: many rows fill a GPU anyhow."""
    return 16 if rows < 512 else 4


def add_norm(x: Tensor, more: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Returns (x + more, its layer norm); all are [rows, width] of one dtype.

    `norm` must have weight and bias. Means and variances are computed in float32.
    """
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
        num_warps=warps(rows),
        **overlapping.options(x.device),
    )
    return total, normed


def _sum_and_norm(  # type: ignore[no-untyped-def]  # Triton reads annotations
    total,
    x,
    more,
    weight,
    bias,
    eps,
    width: tl.constexpr,
    padded_width: tl.constexpr,
):
    """Stores the sum of this program's row and returns its norm, padded with zeros."""
    columns = tl.arange(0, padded_width)
    inside = columns < width
    places = tl.program_id(0).to(tl.int64) * width + columns
    # torch also rounds the sum to its dtype before the norm.
    added = tl.load(x + places, inside, 0).to(tl.float32) + tl.load(more + places, inside, 0)
    rounded = added.to(total.dtype.element_ty)
    tl.store(total + places, rounded, inside)
    values = rounded.to(tl.float32)
    centred = tl.where(inside, values - tl.sum(values) / width, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred) / width + eps)
    scaled = centred * scale * tl.load(weight + columns, inside, 0).to(tl.float32)
    return scaled + tl.load(bias + columns, inside, 0)


sum_and_norm = triton.jit(_sum_and_norm)


def _add_and_normalise(  # type: ignore[no-untyped-def]
    total,
    normed,
    x,
    more,
    weight,
    bias,
    eps,
    width: tl.constexpr,
    padded_width: tl.constexpr,
    overlap: tl.constexpr,
):
    if overlap:
        gdc_launch_dependents()
        gdc_wait()
    values = sum_and_norm(total, x, more, weight, bias, eps, width, padded_width)
    columns = tl.arange(0, padded_width)
    places = tl.program_id(0).to(tl.int64) * width + columns
    tl.store(normed + places, values, columns < width)


_kernel = triton.jit(_add_and_normalise)
