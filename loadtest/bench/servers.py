"""Servers to measure: started on a free port, asked until ready, stopped with all they started."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from blip2_serve.client import is_loopback

# The flags that the kinds of this project's server differ by.
KINDS = {"blip2-serve": (), "fast": ("--fast",), "int8": ("--quantize", "int8")}
MONOLITH = "monolith"
NAMES = (*KINDS, MONOLITH)

READY_WITHIN_S, READY_POLL_S = 300, 0.5
STOPPED_WITHIN_S, STOP_POLL_S = 60, 0.1
SAMPLE_EVERY_S = 5.0
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Serve gives up after 5 seconds where several processes load torch on two busy cores.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "TOKENIZERS_PARALLELISM": "false",
}


class ServerFailed(Exception):
    """A server did not become ready."""


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server that answers. `process` is None for one that ran already."""

    url: str  # up to /v1
    model: str
    process: psutil.Popen | None = None


def connect(url: str) -> Endpoint:
    """A server that runs already, at http://host:port or http://host:port/v1."""
    url = url.rstrip("/").removesuffix("/v1") + "/v1"
    return Endpoint(url, _model(url))


@contextlib.contextmanager
def running(name: str, checkpoint: Path, log: Path) -> Iterator[Endpoint]:
    """One of NAMES, ready; whatever it printed is in `log`. Gone afterwards, children included.

    Raises:
        ServerFailed: it ended, or was not ready in time.
    """
    port = free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = psutil.Popen(
            command(name, checkpoint, port),
            env=os.environ | ENVIRONMENT,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us: we stop it then
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, url, log)
        yield Endpoint(f"{url}/v1", _model(f"{url}/v1"), process)
    finally:
        stop(process)


def command(name: str, checkpoint: Path, port: int) -> list[str]:
    """How to start one of NAMES with this interpreter."""
    if name == MONOLITH:
        script = str(Path(__file__).with_name("monolith.py"))
        return [sys.executable, script, str(checkpoint), "--port", str(port)]
    up = [sys.executable, "-m", "blip2_serve", "up"]
    flags = ["--model", str(checkpoint), "--dtype", "bfloat16", "--port", str(port)]
    return [*up, *flags, *KINDS[name]]


def stop(process: psutil.Popen) -> None:
    """SIGTERM, then time to end in order; SIGKILL for what is left of the tree."""
    tree = _tree(process)
    try:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
        deadline = time.monotonic() + STOPPED_WITHIN_S
        while any(map(_lives, tree)) and time.monotonic() < deadline:
            time.sleep(STOP_POLL_S)
    finally:  # also when we are interrupted once more
        for left in filter(_lives, tree):
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait()
        psutil.wait_procs(tree, STOPPED_WITHIN_S)


@dataclass(frozen=True)
class ProcessMemory:
    pid: int
    name: str
    bytes: int  # that no other process shares (USS)

    @property
    def is_replica(self) -> bool:
        return self.name.startswith("ServeReplica:")


def memory(process: psutil.Popen) -> list[ProcessMemory]:
    """Of each process of the tree.

    Files that are only mapped and cached by the kernel do not count.
    """
    found = []
    for member in _tree(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            used = member.memory_full_info().uss
            found.append(ProcessMemory(member.pid, _name(member.cmdline()), used))
    return found


class PeakMemory:
    """Samples a process tree's memory every five seconds while it is entered.

    `peak` is the largest sum over the tree of what `memory` says, Ray's own processes included.
    """

    def __init__(self, process: psutil.Popen | None) -> None:
        self.peak: int | None = None
        self._process = process
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        if self._process is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._process is not None:
            self._thread.join()

    def _sample(self) -> None:
        assert self._process is not None
        while not self._done.wait(SAMPLE_EVERY_S):
            used = sum(member.bytes for member in memory(self._process))
            self.peak = max(used, self.peak or 0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(process: psutil.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = "\n".join(log.read_text().splitlines()[-20:])
            raise ServerFailed(f"it ended with {process.returncode}; the end of {log}:\n{last}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready", timeout=5, trust_env=False).is_success:
                return
        time.sleep(READY_POLL_S)
    raise ServerFailed(f"not ready after {READY_WITHIN_S} s; see {log}")


def _model(url: str) -> str:
    """The name of the first model that a server lists."""
    try:
        answer = httpx.get(
            f"{url}/models", timeout=30, trust_env=not is_loopback(url)
        ).raise_for_status()
    except httpx.HTTPError as error:
        raise ServerFailed(f"no list of models at {url}: {error}") from None
    name: str = answer.json()["data"][0]["id"]
    return name


def _name(command: list[str]) -> str:
    """What a process is: the class of an actor, or the program."""
    first = command[0].strip() if command else "?"
    if first.startswith("ray::"):
        return first.removeprefix("ray::").partition(".")[0]  # less the method it runs
    scripts = [Path(part).stem for part in command if part.endswith(".py")]
    return scripts[0] if scripts else Path(first).name


def _tree(process: psutil.Popen) -> list[psutil.Process]:
    try:
        root = psutil.Process(process.pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
