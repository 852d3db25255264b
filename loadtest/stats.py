"""The statistics that reports share."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def percentiles(values: Any, *percents: float) -> tuple[float, ...]:
    """Percentiles of a non-empty sequence or array, linearly interpolated."""
    return tuple(float(value) for value in np.percentile(values, percents))


def medians(pairs: Iterable[Sequence[float]]) -> tuple[float, ...]:
    """The median of each column."""
    return tuple(statistics.median(column) for column in zip(*pairs, strict=True))


def median_ratio(pairs: Iterable[tuple[float, float]]) -> float:
    """The median of first / second, taken within each pair.

    A noisy machine is equally slow for both halves of a pair, but not for two pairs.
    """
    return statistics.median(first / second for first, second in pairs)
