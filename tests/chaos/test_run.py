"""A real server with a replica killed under load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos import checker, history
from tests.chaos.history import Fault

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_a_killed_replica_costs_answers_but_makes_none_wrong(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.chaos.run", "--faults", "3", "--kinds", "kill"]
    finished = subprocess.run(
        [*command, "--output", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    records = history.read(tmp_path / "history.jsonl")
    violations = checker.check(records).violations
    assert len([record for record in records if isinstance(record, Fault)]) == 3
    assert {verdict.fault for verdict in violations} <= {"lost"}, finished.stdout
    assert f"{len(violations)} violations" in finished.stdout
    assert finished.returncode == bool(violations), finished.stderr
