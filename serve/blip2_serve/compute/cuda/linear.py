"""Linear layers for few rows, written in Triton.

A decode step of few sequences takes as long as reading the weights. cuBLAS reads those of most
layers at three quarters of the bandwidth, or less (docs/lab/2026-11-gpu.md). These kernels have
enough loads on their way to reach nearly all of it, start loading before the kernel in front of
them has ended, and apply bias and ReLU to their sums. Every sum has one order, whatever the timing.

Weights stay where torch has them, [out_features, in_features]: a tied head stays tied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn.functional import linear as torch_linear
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from blip2_serve.compute.cuda import overlap as overlapping
from blip2_serve.model.packing import MakeLinear


@dataclass(frozen=True)
class Sums:
    """Multiplies and adds, element by element: for one row or a few."""

    columns: int  # output features per program
    depth: int  # input features at a time: 16 bytes for each thread, so that none are exchanged
    warps: int


@dataclass(frozen=True)
class Dots:
    """Tensor cores, which take 8 rows in the time of one."""

    columns: int
    depth: int
    warps: int
    stages: int  # blocks of weights on their way or in use


# For up to so many rows: how to compute layers of up to NARROW output features, and wider ones.
# More rows are left to cuBLAS.
NARROW = 4096
FEW_ROWS: dict[int, tuple[Sums | Dots, Sums | Dots]] = {
    1: (Sums(8, 1024, 4), Sums(8, 512, 2)),
    2: (Sums(8, 1024, 4), Sums(8, 512, 2)),
    4: (Sums(4, 1024, 4), Dots(64, 128, 4, 4)),
    8: (Dots(16, 512, 2, 4), Dots(64, 128, 4, 4)),
}
MOST_ROWS = 8  # that Dots can compute


class FewRowsLinear(nn.Module):
    """A linear layer, by these kernels for few rows, and ReLU behind it if asked."""

    def __init__(
        self, layer: nn.Linear, *, relu: bool = False, out_dtype: torch.dtype | None = None
    ) -> None:
        """Shares the weights of `layer`. With `out_dtype`, few rows come in that dtype."""
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self._relu, self._out_dtype = relu, out_dtype

    def forward(self, x: Tensor) -> Tensor:
        """[rows, in_features] -> [rows, out_features]."""
        if how := choose(len(x), self.weight):
            return linear(x, self.weight, self.bias, how, relu=self._relu, dtype=self._out_dtype)
        if self._relu and self.bias is not None:
            return torch._addmm_activation(self.bias, x, self.weight.T)
        y = torch_linear(x, self.weight, self.bias)
        return y.relu_() if self._relu else y


def for_few_rows(head: nn.Linear) -> MakeLinear:
    """How to make a decoder's layers. Few rows of its `head` are float32: logits, unrounded."""

    def make(layer: nn.Linear, activation: str) -> nn.Module | None:
        if activation not in ("none", "relu"):
            return None
        out_dtype = torch.float32 if layer is head else None
        return FewRowsLinear(layer, relu=activation == "relu", out_dtype=out_dtype)

    return make


def choose(rows: int, weight: Tensor) -> Sums | Dots | None:
    """How to compute so many rows; None: not by these kernels."""
    for limit, (narrow, wide) in FEW_ROWS.items():
        if 0 < rows <= limit:
            how = narrow if len(weight) <= NARROW else wide
            # Tensor cores would round float32.
            fits = isinstance(how, Sums) or weight.element_size() == 2
            return how if fits else None
    return None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    how: Sums | Dots,
    *,
    relu: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x weight^T + bias, and ReLU if asked; sums are computed in float32.

    Args:
        x: [rows, in_features], few rows; for Dots up to MOST_ROWS.
        weight: [out_features, in_features], contiguous.
        bias: [out_features] or None.
        dtype: of the result; that of `x` if not given.

    Returns:
        [rows, out_features].
    """
    (rows, inputs), outputs = x.shape, len(weight)
    out = torch.empty((rows, outputs), dtype=dtype or x.dtype, device=x.device)
    arguments = (out, x.contiguous(), weight, bias, rows, outputs, inputs)
    constants = {
        "columns": how.columns,
        "depth": how.depth,
        "relu": relu,
        "num_warps": how.warps,
        **overlapping.options(x.device),
    }
    grid = (triton.cdiv(outputs, how.columns),)
    if isinstance(how, Sums):
        padded_rows = triton.next_power_of_2(rows)
        vector = 16 // x.element_size()
        _sums_kernel[grid](*arguments, padded_rows=padded_rows, vector=vector, **constants)
    else:
        assert rows <= MOST_ROWS
        assert x.element_size() == 2
        _dots_kernel[grid](*arguments, padded_rows=MOST_ROWS, stages=how.stages, **constants)
    return out


def _sums(  # type: ignore[no-untyped-def]  # Triton reads annotations
    out,
    x,
    weight,
    bias,
    rows,
    outputs,
    inputs,
    padded_rows: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
    vector: tl.constexpr,
    relu: tl.constexpr,
    overlap: tl.constexpr,
):
    # All blocks have three dimensions, rows x columns x depth, and lie in the same threads: the
    # loop exchanges nothing between them.
    row = tl.arange(0, padded_rows)[:, None, None]
    column = (tl.program_id(0) * columns + tl.arange(0, columns))[None, :, None]
    step = tl.arange(0, depth)[None, None, :]
    row_x = x + row * inputs + step
    row_weight = weight + column.to(tl.int64) * inputs + step
    if overlap:
        gdc_launch_dependents()
    wanted = (column < outputs) & (step < inputs)
    weights = tl.load(row_weight, wanted, 0, eviction_policy="evict_first")
    if overlap:
        gdc_wait()
    total = tl.zeros([padded_rows, columns, depth // vector], tl.float32)
    for start in range(0, inputs, depth):
        wanted = (row < rows) & (start + step < inputs)
        values = tl.load(row_x + start, wanted, 0)
        # The next weights are on their way while these are used.
        wanted = (column < outputs) & (start + depth + step < inputs)
        following = tl.load(row_weight + (start + depth), wanted, 0, eviction_policy="evict_first")
        products = weights.to(tl.float32) * values.to(tl.float32)
        by_thread = tl.reshape(products, [padded_rows, columns, depth // vector, vector])
        total += tl.sum(by_thread, 3)
        weights = following
    result = tl.sum(total, 2)
    row = tl.arange(0, padded_rows)[:, None]
    column = (tl.program_id(0) * columns + tl.arange(0, columns))[None, :]
    if bias is not None:
        result += tl.load(bias + column, column < outputs, 0).to(tl.float32)
    if relu:
        result = tl.maximum(result, 0.0)
    tl.store(out + row * outputs + column, result, (row < rows) & (column < outputs))


def _dots(  # type: ignore[no-untyped-def]  # Triton reads annotations
    out,
    x,
    weight,
    bias,
    rows,
    outputs,
    inputs,
    padded_rows: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
    stages: tl.constexpr,
    relu: tl.constexpr,
    overlap: tl.constexpr,
):
    row = tl.arange(0, padded_rows)
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    step = tl.arange(0, depth)
    row_x = x + row[:, None] * inputs + step[None, :]
    row_weight = weight + column.to(tl.int64)[:, None] * inputs
    if overlap:
        gdc_launch_dependents()
        # Two blocks into the L2 cache: one address for each of its lines of 64 elements.
        line = tl.minimum(tl.arange(0, 2 * depth // 64) * 64, inputs - 1)
        inside = tl.minimum(column, outputs - 1).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [(weight + inside[:, None] * inputs + line[None, :]).to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        gdc_wait()
    total = tl.zeros([columns, padded_rows], tl.float32)
    for start in tl.range(0, inputs, depth, num_stages=stages):
        left = (start + step < inputs)[None, :]
        weights = tl.load(
            row_weight + (start + step)[None, :], (column < outputs)[:, None] & left, 0
        )
        values = tl.load(row_x + start, (row < rows)[:, None] & left, 0)
        total = tl.dot(weights, tl.trans(values), total)
    if bias is not None:
        total += tl.load(bias + column, column < outputs, 0).to(tl.float32)[:, None]
    if relu:
        total = tl.maximum(total, 0.0)
    place = out + row[None, :] * outputs + column[:, None]
    tl.store(place, total, (row < rows)[None, :] & (column < outputs)[:, None])


# The number of rows is no reason to compile again, and padding is the same for several.
_sums_kernel = triton.jit(_sums, do_not_specialize=["rows"])
_dots_kernel = triton.jit(_dots, do_not_specialize=["rows"])
