"""Draws tokens from scores, many rows at once and without waiting for the device.

Probabilities are integers here: multiples of a tiny share of the likeliest token's. Sums of
integers do not depend on their order, which on a GPU changes with the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from blip2_serve.types import SamplingParams

LARGEST_TOP_K = 4096  # beyond, a sort is faster than `topk`
PART = 128  # columns; divides the vocabulary of OPT, which saves a copy


@dataclass(frozen=True)
class Filters:
    """What drops tokens of a row. Rows that have the same are drawn together."""

    top_k: bool
    top_p: bool
    min_p: bool
    sort: bool  # to find the tokens that top_k or top_p keeps

    @classmethod
    def of(cls, params: SamplingParams, vocabulary: int) -> Filters:
        top_k, top_p = 0 < params.top_k < vocabulary, params.top_p < 1
        sort = params.top_k > LARGEST_TOP_K if top_k else top_p
        return cls(top_k, top_p, params.min_p > 0, sort)


# (weights, scores, top_p [n, 1]) -> weights; see `keep_top_p`
KeepTopP = Callable[[Tensor, Tensor, Tensor], Tensor]


def draw(
    scores: Tensor, params: Tensor, filters: Filters, largest_k: int, keep: KeepTopP
) -> Tensor:
    """Inverts the cumulative distribution of each row at its random number.

    Args:
        scores: float32 [n, vocabulary].
        params: float64 [5, n, 1]: temperature, top_k, top_p, min_p, and the number, in [0, 1).
        filters: What drops tokens, in all rows.
        largest_k: Of the rows' top_k.
        keep: What top_p does where there is no top_k.

    Returns:
        int64 [n].
    """
    temperature, top_k, top_p, min_p, number = params.unbind()
    # Subtracting the largest score keeps the others finite at tiny temperatures.
    shifted = scores.double().sub_(scores.amax(-1, keepdim=True))
    weights, largest = _integers(shifted.div_(temperature).exp_())
    if filters.top_k:
        weights = _keep_top_k(weights, scores, top_k.long(), top_p, filters, largest_k)
    elif filters.top_p:
        weights = keep(weights, scores, top_p)
    if filters.min_p:
        weights = torch.where(weights < (min_p * largest).ceil().long(), 0, weights)
    sums = _RunningSums(weights)
    # Rounding can make the product the whole sum; it then means the last possible token.
    target = (number * sums.total).long().minimum(sums.total - 1)
    return sums.first_above(target)[:, 0]


def _integers(shares: Tensor) -> tuple[Tensor, int]:
    """Turns float64 [n, columns], at most 1, into int64 in the same memory, and says what 1 became.

    They are as fine as sums of all columns allow.
    """
    exponent = max(1, shares.shape[1].bit_length() - 11)
    # A power of 2 above 1 gives all sums its exponent. Their bits, counted from its own, are then
    # the shares in units of its last place.
    power, bits = 2.0**exponent, (1023 + exponent) << 52
    return shares.add_(power).view(torch.int64).sub_(bits), 1 << (52 - exponent)


def keep_top_p(weights: Tensor, scores: Tensor, top_p: Tensor) -> Tensor:
    """The weights, but 0 for tokens behind those that sum to `top_p` of their row's sum.

    The likeliest comes first, and of equal ones that with the lowest id.

    Args:
        weights: int64 [n, vocabulary], larger where the score is; may be overwritten.
        scores: float32 [n, vocabulary].
        top_p: float64 [n, 1].
    """
    return _keep_top_p(weights, scores, scores.sort(dim=-1, descending=True), top_p)


def _keep_top_k(
    weights: Tensor, scores: Tensor, top_k: Tensor, top_p: Tensor, filters: Filters, largest_k: int
) -> Tensor:
    """The weights, but 0 for tokens that top_k, and then top_p, drops."""
    best = scores.sort(dim=-1, descending=True) if filters.sort else scores.topk(largest_k)
    threshold = best.values.gather(1, top_k - 1)
    weights = torch.where(scores < threshold, 0, weights)
    return _keep_top_p(weights, scores, best, top_p, top_k) if filters.top_p else weights


def _keep_top_p(
    weights: Tensor, scores: Tensor, best: Any, top_p: Tensor, top_k: Tensor | None = None
) -> Tensor:
    """`best` has the likeliest `values` of the scores, in order, and their `indices`."""
    ordered = weights.gather(1, best.indices)
    sums = _RunningSums(ordered)
    # Tokens that tie with the last of the top_k stay, whether in `best` or not.
    total = sums.total if top_k is None else weights.sum(-1, keepdim=True)
    # A token stays if those before it sum to less than top_p; the likeliest always stays.
    last_mass = (top_p * total).ceil().long().sub_(1).clamp_(min=0)
    last = sums.first_above(last_mass)
    if top_k is not None:
        last = last.minimum(top_k - 1)
    lowest = best.values.gather(1, last)
    # Those that tie with the last one come in the order of their ids.
    before = torch.where(best.values > lowest, ordered, 0).sum(-1, keepdim=True)
    each = ordered.gather(1, last).clamp_(min=1)
    equal = scores == lowest
    last_id = _RunningSums(equal).first_above((last_mass - before) // each)
    ids = torch.arange(scores.shape[1], device=scores.device)
    return torch.where((scores < lowest) | (equal & (ids > last_id)), 0, weights)


class _RunningSums:
    """Running sums of the rows of a tensor of integers: of its parts, and within one if needed.

    A GPU takes ten times as long for those of all columns.
    """

    def __init__(self, values: Tensor) -> None:
        """`values` is int64 or bool [n, columns]."""
        self._last = values.shape[1] - 1
        padding = -values.shape[1] % PART
        padded = pad(values, (0, padding)) if padding else values
        self._parts = padded.view(len(values), -1, PART)
        sums = self._parts.sum(-1)
        self._ends = sums.cumsum(-1)
        self._starts = self._ends - sums
        self.total = self._ends[:, -1:]

    def first_above(self, targets: Tensor) -> Tensor:
        """The first column whose running sum exceeds the row's target, else the last; [n, 1]."""
        part = torch.searchsorted(self._ends, targets, right=True)
        part.clamp_(max=self._ends.shape[1] - 1)
        rest = targets - self._starts.gather(1, part)
        values = self._parts.gather(1, part[:, :, None].expand(-1, 1, PART))[:, 0]
        inside = torch.searchsorted(values.cumsum(-1), rest, right=True)
        return part.mul_(PART).add_(inside).clamp_(max=self._last)
