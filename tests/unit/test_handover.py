"""`blip2-serve load` and `bench`: what they run, and what they say if they cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from blip2_serve.cli import handover
from blip2_serve.cli.commands import app
from blip2_serve.errors import StartupError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were handed over to, without their Python."""
    found: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda _, command, __: found.append(command[1:]))
    return found


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, StartupError):
        return str(result.exception)
    assert result.exit_code == 0, result.output
    return result.output


def test_load_runs_locust_as_make_load_does(handed: list[list[str]]) -> None:
    run("load", "steady", "--url", "http://127.0.0.1:9", "--level", "8")
    (command,) = handed
    assert command[:4] == ["-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py")]
    assert command[command.index("-H") + 1] == "http://127.0.0.1:9"
    assert command[command.index("--scenario") + 1] == "steady"
    assert command[command.index("--output") + 1] == str(Path("results/steady"))
    assert command[-2:] == ["--level", "8"]
    makefile = (ROOT / "Makefile").read_text()
    assert "--headless --only-summary -H" in makefile
    assert {"--headless", "--only-summary"} <= {*command}


def test_bench_runs_a_benchmark_with_its_own_options(handed: list[list[str]]) -> None:
    run("bench", "hops", "--help")
    assert handed == [["-m", "loadtest.bench.hops", "--help"]]


def test_every_benchmark_that_is_listed_can_be_run() -> None:
    known = handover.benchmarks(ROOT)
    assert {"compare", "overload", "hops"} <= known.keys()
    for name, about in known.items():
        assert about.endswith("."), name
        assert f"  {name} " in run("bench")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(("load", "nonsense"), "there are: chaos, day, mixed", id="a scenario"),
        pytest.param(("bench", "nonsense"), "no benchmark 'nonsense'", id="a benchmark"),
        pytest.param(
            ("bench", "client"), "no benchmark 'client'", id="a module that is no command"
        ),
    ],
)
def test_an_unknown_name_is_told_with_those_there_are(
    handed: list[list[str]], arguments: tuple[str, ...], said: str
) -> None:
    assert said in run(*arguments)
    assert not handed


def test_without_the_repository_it_says_where_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(handover, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "run this in a clone of it" in run("load")


def test_without_locust_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover.importlib.util, "find_spec", lambda _: None)
    assert "locust is not installed; in the repository: pip install" in run("load")


def test_the_handed_over_command_finds_the_repository_from_anywhere(tmp_path: Path) -> None:
    tell = "import loadtest, json, sys; print(json.dumps([loadtest.__file__, sys.argv]))"
    code = f"from blip2_serve.cli.handover import hand_over; hand_over(['-c', {tell!r}, 'x'])"
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(said) == [str(ROOT / "loadtest" / "__init__.py"), ["-c", "x"]]
