"""What a load test measures, one sample a line, and the file that it is kept in.

The locust scripts write `samples.csv`; report, SLOs, comparison and capacity read it. Nothing here
knows locust.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

FILE = "samples.csv"

# "latency": from the intended start to the whole answer. "ttft": to the first text of a stream.
# "inter_token": between a stream's texts, by the tokens of each, its mean. All three in seconds.
# "tokens_per_s": of one stream, by the time from its start to its last text.
Measure = Literal["latency", "ttft", "inter_token", "tokens_per_s"]


class Failure(Exception):
    """What was wrong with an answer, for locust's list of failures."""


@dataclass(frozen=True)
class Sample:
    """One measure of one request."""

    time: float  # when the request was to start, in seconds since 1970
    kind: str  # of traffic, such as "caption" or "streaming chat"
    measure: Measure
    value: float
    tokens: int = 0  # of the answer; with "latency" only
    failure: str = ""  # why the answer was wrong; empty: it was right


def write(path: Path, samples: Iterable[Sample]) -> None:
    """A CSV file with a header, in the order given."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Sample))
        writer.writerows(astuple(sample) for sample in samples)


def read(path: Path) -> list[Sample]:
    """What `write` wrote.

    Raises:
        ValueError: it is no such file.
    """
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames != [field.name for field in fields(Sample)]:
            raise ValueError(f"{path} is not a file of samples: its columns are {rows.fieldnames}")
        return [_sample(row) for row in rows]


def _sample(row: dict[str, str]) -> Sample:
    measure = next((m for m in get_args(Measure) if m == row["measure"]), None)
    if measure is None:
        raise ValueError(f"unknown measure {row['measure']!r}")
    return Sample(
        float(row["time"]),
        row["kind"],
        measure,
        float(row["value"]),
        int(row["tokens"]),
        row["failure"],
    )
