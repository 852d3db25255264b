"""The samples of a load test, and `samples.csv`, which holds them.

locust's users write them; report, SLOs, comparison and capacity read them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loadtest.results import read_csv, write_csv

FILE = "samples.csv"

# latency: seconds from the scheduled start to the whole answer. ttft: to a stream's first text.
# inter_token: mean seconds per token between a stream's first text and its last.
# tokens_per_s: of one stream, from its start to its last text.
Measure = Literal["latency", "ttft", "inter_token", "tokens_per_s"]


@dataclass(frozen=True)
class Sample:
    """One measure of one request."""

    time: float  # scheduled start, in seconds since 1970
    kind: str  # of traffic, such as "caption" or "streaming chat"
    measure: Measure
    value: float
    tokens: int = 0  # of the answer; latency only
    failure: str = ""  # why the answer is wrong; empty if it is right


def latencies(samples: Iterable[Sample]) -> list[Sample]:
    """One sample per request."""
    return [sample for sample in samples if sample.measure == "latency"]


def write(path: Path, samples: Iterable[Sample]) -> None:
    write_csv(path, Sample, samples)


def read(path: Path) -> list[Sample]:
    """Raises ValueError if `path` is not a file of samples."""
    return read_csv(path, Sample)
