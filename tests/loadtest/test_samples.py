"""Samples survive the way through their file."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.load import samples
from loadtest.load.samples import Sample


def test_samples_are_read_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / samples.FILE
    written = [
        Sample(1.5, "caption", "latency", 0.25, tokens=12),
        Sample(2.0, "streaming chat", "ttft", 0.1, failure='status 500: "no,\nnothing"'),
    ]

    samples.write(path, written)

    assert samples.read(path) == written


def test_a_file_with_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")

    with pytest.raises(ValueError, match="does not hold Samples"):
        samples.read(path)
