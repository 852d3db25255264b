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
def test_faults_of_many_kinds_lose_no_request_and_change_no_answer(tmp_path: Path) -> None:
    """Takes about three minutes; `make chaos` does the same for as long as you like."""
    kinds = ["kill", "freeze", "kill_two", "controller"]
    command = [sys.executable, "-m", "tests.chaos.run", "--faults", "5", "--kinds", *kinds]
    finished = subprocess.run(
        [*command, "--output", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    records = history.read(tmp_path / "history.jsonl")
    assert len([record for record in records if isinstance(record, Fault)]) >= 5
    assert not checker.check(records).violations, finished.stdout
    assert finished.returncode == 0, finished.stderr
