"""Servers stop with all their processes; one that cannot start says why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from loadtest.bench import servers

# Starts a child; both ignore SIGTERM.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) < 2:
    subprocess.Popen([sys.executable, __file__, "child"])
print("started", flush=True)
time.sleep(60)
"""


@pytest.fixture
def stubborn(tmp_path: Path) -> psutil.Popen:
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    process = psutil.Popen([sys.executable, script], stdout=subprocess.PIPE)
    for _ in range(2):
        assert process.stdout.readline() == b"started\n"
    return process


def test_nothing_is_left_of_a_server_that_ignores_sigterm(
    stubborn: psutil.Popen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "STOPPED_WITHIN_S", 0.3)
    child = stubborn.children()[0]

    servers.stop(stubborn)

    assert stubborn.returncode == -9
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_peak_memory_covers_the_whole_process_tree(
    stubborn: psutil.Popen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "SAMPLE_EVERY_S", 0.01)
    monkeypatch.setattr(servers, "STOPPED_WITHIN_S", 0)
    alone = stubborn.memory_full_info().uss
    with servers.PeakMemory(stubborn) as memory:
        while memory.peak is None:
            pass
    servers.stop(stubborn)

    assert memory.peak > 1.5 * alone


def test_a_server_that_exits_is_reported_with_its_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = [sys.executable, "-c", "raise SystemExit('no such flag')"]
    monkeypatch.setattr(servers, "command", lambda *_: ends)

    with (
        pytest.raises(servers.ServerFailed, match="no such flag"),
        servers.running("int8", tmp_path, tmp_path / "logs" / "int8.log"),
    ):
        pass


def test_every_kind_serves_the_checkpoint_in_bfloat16_on_the_port() -> None:
    for name in servers.KINDS:
        command = " ".join(servers.command(name, Path("there"), 123))
        assert "--model there --dtype bfloat16 --port 123" in command
    assert servers.command("int8", Path("there"), 123)[-2:] == ["--quantize", "int8"]
    assert servers.command("monolith", Path("there"), 123)[-3:] == ["there", "--port", "123"]


@pytest.mark.parametrize(
    ("command", "name"),
    [
        pytest.param(
            ["ray::ServeReplica:app:Encoder   "], "ServeReplica:app:Encoder", id="replica"
        ),
        pytest.param(["ray::ProxyActor.receive"], "ProxyActor", id="an actor running a method"),
        pytest.param(["/bin/python", "-u", "/ray/monitor.py", "--x"], "monitor", id="a script"),
        pytest.param(["/ray/gcs_server", "--log_dir=/tmp"], "gcs_server", id="a program"),
        pytest.param([], "?", id="a process that has ended"),
    ],
)
def test_process_names_say_what_they_are(command: list[str], name: str) -> None:
    assert servers._name(command) == name


def test_memory_lists_each_process_of_the_tree(
    stubborn: psutil.Popen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "STOPPED_WITHIN_S", 0)
    pids = {stubborn.pid, stubborn.children()[0].pid}
    found = servers.memory(stubborn)
    servers.stop(stubborn)

    assert {member.pid for member in found} == pids
    assert all(member.bytes > 1_000_000 for member in found)
