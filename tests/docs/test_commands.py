"""Every command that a document shows works, and prints what the document says.

Fenced blocks in `sh`, `bash`, `console` and `python` are run in a folder that looks like the
repository with its `.venv`, against one server: the one that `make serve` would start. A command
that cannot be run here is listed in `NOT_RUN` with the reason.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import yaml

from blip2_serve.config import AppConfig
from support.up import Up, running_up

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "k8s" / "README.md",
    ROOT / "loadtest" / "README.md",
]
URL = "http://127.0.0.1:8000"
WITHIN_S = 180

# Commands that are not run, by the reason why not; a star matches anything.
NOT_RUN: Mapping[str, tuple[str, ...]] = {
    "it is the server that the others ask": ("make serve",),
    "starts another server; tests/up does that": (
        "make serve ARGS=*",
        "OTEL_EXPORTER_OTLP_ENDPOINT=* .venv/bin/blip2-serve up --trace 0.01",
        ".venv/bin/blip2-serve up --api-keys keys.yaml",
    ),
    "needs a file or a folder of the reader's": (
        ".venv/bin/blip2-serve up --config FILE.yaml *",
        "make serve MODEL=/path/to/checkpoint *",
    ),
    "downloads gigabytes": (
        "make serve MODEL=Salesforce/*",
        ".venv/bin/blip2-serve up --model Salesforce/*",
        ".venv/bin/blip2-serve doctor --model Salesforce/*",
        "python k8s/weights.py pin *",
    ),
    "tests/serve/test_serve_run.py and tests/up/test_dev_cpu.py do it": (
        ".venv/bin/serve run blip2_serve.app:build *",
        ".venv/bin/serve deploy serve.yaml",
    ),
    "tests/loadtest/test_gpu.py does it": (
        ".venv/bin/python -m loadtest.bench.gpu --device cpu --shape small",
    ),
    "the tests themselves": (
        "make test",
        "make test-quick",
        "make test-long",
        "make soak",
        "make image-test",
    ),
    "the first step of CI": ("make check",),
    "installs packages": ("make install", ".venv/bin/pip install *"),
    "takes minutes": (
        "make load SCENARIO=*",
        ".venv/bin/blip2-serve load *",
        "make chaos*",
        ".venv/bin/python -m loadtest.bench.overload *",
        ".venv/bin/python -m loadtest.bench.compare *",
        ".venv/bin/python -m loadtest.load.capacity find *",
        ".venv/bin/python -m loadtest.simulation *",
    ),
    "needs the results of those": (
        ".venv/bin/python -m loadtest.load.compare_runs results/*",
        ".venv/bin/python -m loadtest.load.capacity plan *",
        "xdg-open *",
    ),
    "needs a cluster": ("kubectl *", "helm install *", "kind *"),
    "needs a container engine, as make image-test does not": (
        "docker build *",
        "docker run *",
    ),
    "opens an editor": ("$EDITOR *",),
}
PATTERNS = {pattern: reason for reason, patterns in NOT_RUN.items() for pattern in patterns}


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks(document: Path) -> Iterator[Block]:
    text = document.read_text()
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(document, line, match[1], match[2])


ALL = [block for document in DOCUMENTS for block in blocks(document)]
SHELL = [block for block in ALL if block.language in ("sh", "bash")]
CONSOLE = [block for block in ALL if block.language == "console"]
PYTHON = [block for block in ALL if block.language == "python"]
YAML = [block for block in ALL if block.language == "yaml"]


def commands(block: Block) -> list[str]:
    """Of a shell block: one for each line, less its comment; lines that go on are joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    stripped = (re.sub(r"(^|\s)#\s.*$", "", line).strip() for line in lines)
    return [line for line in stripped if line]


def session(block: Block) -> list[tuple[str, str]]:
    """Of a console block: each command with what it prints."""
    parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    assert parts[0] == "", f"{block} must start with $"
    split = (part.partition("\n") for part in parts[1:])
    return [(command, output) for command, _, output in split]


def reason_not_to_run(command: str) -> str | None:
    reasons = (r for pattern, r in PATTERNS.items() if fnmatchcase(command, pattern))
    return next(reasons, None)


EVERY_COMMAND = [command for block in SHELL for command in commands(block)]
EVERY_COMMAND += [command for block in CONSOLE for command, _ in session(block)]


# -- a folder like the repository, and the server --------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with an installed `.venv`; what commands write stays here."""
    folder = tmp_path_factory.mktemp("repository")
    for entry in ROOT.iterdir():
        if entry.name not in (".venv", ".git", "results"):
            (folder / entry.name).symlink_to(entry)
    environment = folder / ".venv"
    environment.mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (environment / name).symlink_to(Path(sys.prefix) / name)
    for name in ("", "-test", "-dev", "-loadtest"):
        (environment / f".installed{name}").touch()  # so make installs nothing
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Started by the command line of `make serve`, but for the port."""
    shown = subprocess.run(
        ["make", "-n", "serve", "--no-print-directory"],  # under another make, it is on
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    program, up, *flags = shlex.split(shown.stdout.splitlines()[-1])
    assert (program, up) == (".venv/bin/blip2-serve", "up")
    at = flags.index("--port")
    assert URL.endswith(f":{flags[at + 1]}")
    del flags[at : at + 2]
    with running_up(tmp_path_factory.mktemp("server"), *flags) as server:
        yield server


def run(command: list[str], folder: Path, server: Up) -> str:
    """What it prints; it must succeed."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    # The small clients ask URL unless they are told of another.
    small = r"(blip2-serve (?:ask|caption|status)\b.*)"
    command = [re.sub(small, rf"\1 --url {URL}", part) for part in command]
    path = f"{Path(sys.executable).parent}:{own['PATH']}"
    done = subprocess.run(
        [part.replace(URL, server.url) for part in command],
        cwd=folder,
        env={**own, "URL": server.url, "PATH": path},
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def matches(expected: str, printed: str) -> bool:
    """Whether they are equal; "..." in the document matches anything."""
    pattern = ".*?".join(map(re.escape, expected.strip().split("...")))
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None


# -- the blocks ------------------------------------------------------------------------------------

RUN_IN_SHELL = [
    block for block in SHELL if not all(reason_not_to_run(command) for command in commands(block))
]


@pytest.mark.parametrize("block", RUN_IN_SHELL, ids=str)
def test_commands_work(block: Block, folder: Path, server: Up) -> None:
    kept = [command for command in commands(block) if not reason_not_to_run(command)]
    run(["bash", "-euo", "pipefail", "-c", "\n".join(kept)], folder, server)


@pytest.mark.parametrize("block", CONSOLE, ids=str)
def test_sessions_print_what_the_document_says(block: Block, folder: Path, server: Up) -> None:
    for command, expected in session(block):
        if reason_not_to_run(command):
            continue
        printed = run(["bash", "-euo", "pipefail", "-c", command], folder, server)
        assert matches(expected, printed), printed


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_prints_what_its_comments_say(block: Block, folder: Path, server: Up) -> None:
    comments = re.findall(r"^print\(.*\)  # (.*)$", block.text, re.MULTILINE)
    prints = re.findall(r"^ *print\(", block.text, re.MULTILINE)
    assert len(prints) == len(comments), "each print says in a comment what comes"
    printed = run([sys.executable, "-c", block.text], folder, server).splitlines()
    assert len(printed) == len(comments), printed
    for expected, line in zip(comments, printed, strict=True):
        assert matches(expected, line)


@pytest.mark.parametrize("block", YAML, ids=str)
def test_configurations_are_valid(block: Block) -> None:
    AppConfig.model_validate(yaml.safe_load(block.text))


# -- what is not run -------------------------------------------------------------------------------


def test_what_is_not_run_is_still_in_a_document() -> None:
    assert [p for p in PATTERNS if not fnmatch.filter(EVERY_COMMAND, p)] == []


def test_every_block_says_its_language() -> None:
    """A block without one would not be run."""
    assert [str(block) for block in ALL if not block.language] == []


@pytest.mark.parametrize("command", [c for c in EVERY_COMMAND if c.startswith("make ")])
def test_make_has_the_targets(command: str, folder: Path) -> None:
    subprocess.run(
        ["make", "-n", *shlex.split(command)[1:]], cwd=folder, check=True, capture_output=True
    )


@pytest.fixture(scope="module")
def flags_of_up() -> set[str]:
    shown = subprocess.run(
        [sys.executable, "-m", "blip2_serve", "up", "--help"],
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(re.findall(r"--[a-z][\w-]*", shown.stdout)) - {"--help"}


def test_up_has_the_flags_that_commands_use(flags_of_up: set[str]) -> None:
    lines = [c for c in EVERY_COMMAND if "blip2-serve up" in c or c.startswith("make serve ARGS")]
    used = {flag for line in lines for flag in re.findall(r"--[a-z][\w-]*", line)}
    assert used
    assert used <= flags_of_up


def test_every_flag_of_up_is_documented(flags_of_up: set[str]) -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    _, _, table = text.partition("\n## Flags\n")
    assert set(re.findall(r"--[a-z][\w-]*", table)) - {"--help"} == flags_of_up
