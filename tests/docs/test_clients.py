"""The table of clients in docs/api.md: each tick is a test, and each such test has its tick."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| `([\w-]+)` \| .+ \| ✓ `(test_\w+)` \|$", re.MULTILINE)


def ticks() -> list[tuple[str, str]]:
    """Client and test of each row."""
    _, section = (ROOT / "docs" / "api.md").read_text().split("\n## Clients\n")
    section = section.partition("\n## ")[0]
    found = ROW.findall(section)
    assert len(found) == section.count("\n| `") == section.count("✓ `")
    return found


def written() -> list[str]:
    """Names of the tests of clients."""
    tree = ast.parse((ROOT / "tests" / "serve" / "test_clients.py").read_text())
    functions = (n for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return [f.name for f in functions if f.name.startswith("test_")]


def test_each_tick_is_a_test_and_each_test_has_a_tick() -> None:
    assert sorted(test for _, test in ticks()) == sorted(written())


def test_each_row_names_the_client_of_its_test() -> None:
    for client, test in ticks():
        assert test.startswith(f"test_{client.replace('-', '_')}_")


def test_each_client_has_a_version_that_is_tested() -> None:
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert {client for client, _ in ticks()} <= {*pinned}
