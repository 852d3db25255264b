"""What `blip2-serve doctor` finds, and what it says to do about it."""

from __future__ import annotations

import resource
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from blip2_serve import doctor
from blip2_serve.cli import main
from blip2_serve.config import AppConfig
from support.checkpoints import Recipe, write_checkpoint
from support.server import free_port


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*doctor.PROXIES, "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def findings(port: int = 0, **config: object) -> dict[str, doctor.Finding]:
    found = doctor.examine(AppConfig.model_validate(config), "127.0.0.1", port or free_port())
    return {finding.about: finding for finding in found}


def test_nothing_is_wrong_here() -> None:
    found = findings()
    assert {finding.state for finding in found.values()} == {"good"}, found
    assert not any(finding.advice for finding in found.values())


def test_a_port_in_use_is_bad() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        finding = findings(listener.getsockname()[1])["port"]
    assert finding.state == "bad"
    assert "--port" in finding.advice


@pytest.mark.parametrize(
    ("exempt", "state"), [("", "odd"), ("localhost,127.0.0.1", "good"), ("*", "good")]
)
def test_a_proxy_for_this_machine_is_odd(
    exempt: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", exempt)
    finding = findings()["proxies"]
    assert finding.state == state
    assert "HTTP_PROXY" in finding.seen
    assert ("no_proxy" in finding.advice) == (state == "odd")


def test_few_open_files_are_odd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1_048_576))
    finding = findings()["open files"]
    assert finding.state == "odd"
    assert "ulimit -n 65536" in finding.advice


def test_a_folder_without_a_checkpoint_is_bad(tmp_path: Path) -> None:
    finding = findings(model=str(tmp_path))["checkpoint"]
    assert finding.state == "bad"
    assert str(tmp_path) in finding.seen


def test_a_checkpoint_without_its_weights_is_bad(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, Recipe("doctor", seed=1))
    assert findings(model=str(folder))["checkpoint"].state == "good"
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    finding = findings(model=str(folder))["checkpoint"]
    assert finding.state == "bad"
    assert "no weights" in finding.seen


def test_a_hub_id_is_not_downloaded() -> None:
    finding = findings(model="Salesforce/blip2-opt-2.7b-coco")["checkpoint"]
    assert finding.state == "odd"
    assert "up" in finding.seen


def test_too_little_memory_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * 10**9))
    finding = findings()["memory"]
    assert finding.state == "bad"
    assert "2.0 GB are free" in finding.seen


def test_the_exit_code_says_whether_a_server_can_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["blip2-serve", "doctor", "--model", "./nowhere"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    printed = capsys.readouterr().out
    assert "BAD checkpoint: there is no checkpoint folder at ./nowhere" in printed
    assert "-> give a folder" in printed
