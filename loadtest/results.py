"""Result files (JSON, CSV, Markdown tables), and where and with what they were measured."""

from __future__ import annotations

import contextlib
import csv
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

PACKAGES = ("blip2-serve", "torch", "transformers", "ray")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def write_csv(path: Path, kind: type[Any], rows: Iterable[Any]) -> None:
    """Writes instances of the dataclass `kind` under a header with its field names."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(kind))
        writer.writerows(map(astuple, rows))


def read_csv(path: Path, kind: type[T]) -> list[T]:
    """Reads what `write_csv` wrote.

    Raises:
        ValueError: the columns are not the fields of `kind`.
    """
    numbers = {"float": float, "int": int}
    columns = fields(kind)  # type: ignore[arg-type]
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames != [column.name for column in columns]:
            raise ValueError(f"{path} does not hold {kind.__name__}s: {rows.fieldnames}")
        return [
            kind(*(numbers.get(str(c.type), str)(row[c.name]) for c in columns)) for row in rows
        ]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligns the first column left and all others right."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" + "|---:" * (len(head) - 1) + "|", *lines[1:]])


def machine() -> dict[str, Any]:
    """CPU, cores, versions, revision and date."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **versions,
        "revision": _revision(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _revision() -> str:
    """Empty outside a git checkout."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError):  # an image without git
        return subprocess.run(
            describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        ).stdout.strip()
    return ""


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
