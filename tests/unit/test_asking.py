"""`blip2-serve caption` and `ask`, beside the routes with a fake backend."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
import uvicorn

from blip2_serve.cli import main, watching
from blip2_serve.config import AppConfig
from blip2_serve.errors import InvalidImage
from blip2_serve.http.api import create_app
from support.fake_backend import TEXT, FakeBackend
from support.recorder import FakeRecorder
from support.server import free_port, wait_until


def answer(name: str) -> str:
    return f"{name}:{TEXT}".strip()


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend(failures={b"broken": InvalidImage("it is broken")})


@pytest.fixture
def url(backend: FakeBackend) -> Iterator[str]:
    app = create_app(backend, AppConfig(), FakeRecorder())
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


class Run(Protocol):
    def __call__(self, *arguments: object, stdin: bytes = b"") -> tuple[int, str, str]: ...


@pytest.fixture
def run(url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command; returns exit code, output and errors."""

    def run(*arguments: object, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["blip2-serve", *map(str, arguments), "--url", url])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, printed.out, printed.err

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.JPG", "notes.txt"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def test_one_image_is_captioned_without_its_name(run: Run, folder: Path) -> None:
    assert run("caption", folder / "b.png") == (0, f"{answer('b.png')}\n", "")


def test_the_images_of_a_folder_are_captioned_in_order(run: Run, folder: Path) -> None:
    code, out, err = run("caption", folder, folder / "notes.txt")
    names = ("a.JPG", "b.png", "notes.txt")
    assert (code, err) == (0, "")
    assert out == "".join(f"{folder / name}: {answer(name)}\n" for name in names)


def test_captions_as_json(run: Run, folder: Path) -> None:
    code, out, _ = run("caption", "--json", folder)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert lines == [{"file": str(folder / n), "caption": answer(n)} for n in ("a.JPG", "b.png")]


def test_an_image_on_standard_input(run: Run, backend: FakeBackend) -> None:
    assert run("caption", "-", stdin=b"bytes\0") == (0, answer("bytes\0") + "\n", "")
    assert backend.encoded == [b"bytes\0"]


def test_one_broken_file_costs_no_other_one(run: Run, folder: Path) -> None:
    (folder / "aa.png").write_bytes(b"broken")
    code, out, err = run("caption", folder, folder / "missing.png")
    assert code == 1
    assert out == "".join(f"{folder / name}: {answer(name)}\n" for name in ("a.JPG", "b.png"))
    assert f"{folder / 'aa.png'}: it is broken" in err
    assert f"{folder / 'missing.png'}: cannot read" in err


def test_a_folder_without_images_is_an_error(run: Run, tmp_path: Path) -> None:
    code, out, err = run("caption", tmp_path)
    assert (code, out) == (2, "")
    assert "no image files" in err


def test_a_question_is_answered(run: Run, folder: Path, backend: FakeBackend) -> None:
    assert run("ask", folder / "b.png", "what is it?") == (0, f"{answer('b.png')}\n", "")
    assert "what is it?" in backend.prompts[0]


def test_questions_are_a_chat(run: Run, folder: Path, backend: FakeBackend) -> None:
    code, out, _ = run("ask", folder / "b.png", stdin=b"what is it?\nwhat color?\n\nunread\n")
    assert (code, out) == (0, 2 * f"{answer('b.png')}\n")
    first, second = backend.prompts
    assert "what color?" not in first
    assert "what is it?" in second
    assert answer("b.png") in second
    assert "what color?" in second
    assert [*dict.fromkeys(backend.encoded)] == [b"b.png"]


def rows(printed: str) -> list[list[str]]:
    return [line.split() for line in printed.splitlines()]


STATUS = [
    ["ingress", "1"],
    ["preprocessor", "2,", "1", "starting", "3", "12.5", "images/s", "20.5", "images/s"],
    ["encoder", "1,", "1", "stopping", "0", "0.0", "images/s"],
    ["generator", "0,", "1", "starting"],
]


def test_the_status_is_a_table(run: Run) -> None:
    code, out, _ = run("status")
    first, _, *stages = rows(out)
    assert code == 0
    assert first == ["blip2-serve-demo:", "ready"] or first == ["demo:", "ready"]
    assert stages == STATUS


def test_the_status_can_be_watched(
    run: Run, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        backend.is_ready = False
        if len(waits) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(watching.watch, "__defaults__", (wait,))
    code, out, _ = run("status", "--watch")
    assert code == 0
    assert waits == [1, 1, 1]
    assert ["demo:", "not", "ready"] in rows(out)


@pytest.mark.parametrize("after", [0, 3])
def test_an_answer_that_breaks_off_is_an_error(
    after: int, run: Run, folder: Path, backend: FakeBackend
) -> None:
    backend.stream_fails_after = after
    code, _, err = run("ask", folder / "b.png", "what is it?")
    assert code == 2
    assert "a replica was lost" in err
