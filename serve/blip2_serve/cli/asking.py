"""`blip2-serve caption` and `ask`: files in, words out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from rich.progress import track

from blip2_serve import client
from blip2_serve.cli.terminal import err, out
from blip2_serve.errors import StartupError

STDIN = Path("-")
AT_ONCE = 4  # few enough for a server that others use, too
SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("avif", "bmp", "gif", "heic", "heif", "jpe", "jpeg", "jpg", "mpo"),
        *("png", "tif", "tiff", "webp"),
    )
)


def caption_all(server: httpx.Client, paths: Iterable[Path], *, as_json: bool) -> bool:
    """Prints a caption for each image, in order; returns whether all have one."""
    files = [*files_of(paths)]
    complete = True

    def caption(path: Path) -> str | StartupError:
        try:
            return client.caption(server, read(path))
        except StartupError as error:
            return error

    with ThreadPoolExecutor(AT_ONCE) as pool:
        shown = err.is_terminal and len(files) > 1
        captions = track(pool.map(caption, files), "", len(files), console=err, disable=not shown)
        for path, result in zip(files, captions, strict=True):
            if isinstance(result, StartupError):
                complete = False
                err.print(f"{path}: {result}", markup=False)
            elif as_json:
                out.print(json.dumps({"file": str(path), "caption": result}), markup=False)
            else:
                out.print(result if len(files) == 1 else f"{path}: {result}", markup=False)
    return complete


def files_of(paths: Iterable[Path]) -> Iterator[Path]:
    """The image files among them, and in those that are folders.

    Raises:
        StartupError: there is no such file, or none in a folder.
    """
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        found = sorted(f for f in path.iterdir() if f.is_file() and f.suffix.lower() in SUFFIXES)
        if not found:
            raise StartupError(f"{path} has no image files: give another folder, or files")
        yield from found


def read(path: Path) -> bytes:
    """A file, or what is on standard input.

    Raises:
        StartupError: it cannot be read.
    """
    try:
        return sys.stdin.buffer.read() if path == STDIN else path.read_bytes()
    except OSError as error:
        raise StartupError(f"cannot read {path}: {error.strerror}") from None


def ask(server: httpx.Client, image: Path, question: str | None) -> None:
    """Prints the answer as it comes; without a question, to one after another until none comes."""
    chat = client.Chat(server, read(image))
    for asked in questions() if question is None else [question]:
        for piece in chat.ask(asked):
            out.print(piece, end="", markup=False)
        out.print()


def questions() -> Iterator[str]:
    """What is typed, line by line, until Ctrl-D or an empty line."""
    prompt = "> " if sys.stdin.isatty() else ""
    try:
        while asked := input(prompt).strip():
            yield asked
    except (EOFError, KeyboardInterrupt):
        if prompt:
            out.print()
