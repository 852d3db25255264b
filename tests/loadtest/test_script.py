"""Failures end a script with one line; checkpoints are written once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtest.answers import WrongAnswer
from loadtest.bench import checkpoint, script, servers


@pytest.fixture(autouse=True)
def own_sigterm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "error", [WrongAnswer("no"), servers.ServerFailed("no"), script.Missed("no")]
)
def test_a_failure_ends_the_script_with_one_line(error: Exception) -> None:
    with pytest.raises(SystemExit, match="FAILED: no"), script.one_line_failures():
        raise error


def test_sigterm_ends_the_block_as_ctrl_c_does() -> None:
    with pytest.raises(SystemExit, match="interrupted"), script.one_line_failures():
        signal.raise_signal(signal.SIGTERM)


def test_a_checkpoint_is_written_only_if_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def write(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        written.append(folder)

    monkeypatch.setattr(checkpoint, "write_checkpoint", write)
    for _ in range(2):
        with checkpoint.checkpoint_at(tmp_path / "there") as folder:
            assert folder == tmp_path / "there"
    with checkpoint.checkpoint_at(None) as temporary:
        assert temporary.exists()

    assert written == [tmp_path / "there", temporary]
    assert not temporary.exists()
