"""Servers: started on a free port, polled until ready, stopped with all their processes."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import httpx
import psutil

from blip2_serve.client import is_loopback, key_headers

# The flags of each variant of this project's server.
KINDS = {"blip2-serve": (), "int8": ("--quantize", "int8")}
MONOLITH = "monolith"
NAMES = (*KINDS, MONOLITH)
PATIENT = Path(__file__).parent / "patient.yaml"

READY_WITHIN_S, READY_POLL_S = 300, 0.5
STOPPED_WITHIN_S, STOP_POLL_S = 60, 0.1
SAMPLE_EVERY_S = 5.0
LOG_LINES, LOG_COLUMNS = 20, 300  # of a failed server's log, to be shown
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Serve's 5 seconds are too few where several processes import torch on two busy cores.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "TOKENIZERS_PARALLELISM": "false",
}


class ServerFailed(Exception):
    """A server did not become ready."""


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server that answers. `process` is None if it was running already."""

    url: str  # up to and including /v1
    model: str
    process: psutil.Popen | None = None


def connect(url: str) -> Endpoint:
    """A running server at http://host:port or http://host:port/v1.

    Raises:
        ServerFailed: it does not list its models.
    """
    url = url.rstrip("/").removesuffix("/v1") + "/v1"
    return Endpoint(url, _model(url))


@contextlib.contextmanager
def running(name: str, checkpoint: Path, log: Path, *, patient: bool = False) -> Iterator[Endpoint]:
    """Starts one of NAMES, with its output in `log`, and stops it with all its processes.

    One of this project that is `patient` refuses nobody for a wait of less than a minute.

    Raises:
        ServerFailed: it exits, or is not ready in time.
    """
    port = free_port()
    flags = ["--config", str(PATIENT)] if patient and name in KINDS else []
    with started([*command(name, checkpoint, port), *flags], port, log) as endpoint:
        yield endpoint


@contextlib.contextmanager
def started(
    arguments: Sequence[str],
    port: int,
    log: Path,
    variables: Mapping[str, str] = MappingProxyType({}),
    within_s: float = READY_WITHIN_S,
) -> Iterator[Endpoint]:
    """Starts a server that will listen on `port`; `variables` join its environment.

    Its output goes to `log`, and it is stopped with all its processes.

    Raises:
        ServerFailed: it exits, or is not ready in time.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = psutil.Popen(
            arguments,
            env=os.environ | ENVIRONMENT | dict(variables),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # keeps Ctrl-C from it: this process stops it
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, url, log, within_s)
        yield Endpoint(f"{url}/v1", _model(f"{url}/v1"), process)
    finally:
        stop(process)


def command(name: str, checkpoint: Path, port: int) -> list[str]:
    """The command that starts one of NAMES with this interpreter."""
    module = "loadtest.bench.monolith" if name == MONOLITH else "blip2_serve"
    start = [sys.executable, "-m", module]
    if name == MONOLITH:
        return [*start, str(checkpoint), "--port", str(port)]
    flags = ["--model", str(checkpoint), "--dtype", "bfloat16", "--port", str(port)]
    return [*start, "up", *flags, *KINDS[name]]


def stop(process: psutil.Popen) -> None:
    """Sends SIGTERM, waits, and kills what is left of the process tree."""
    tree = _tree(process)
    try:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
        deadline = time.monotonic() + STOPPED_WITHIN_S
        while any(map(_lives, tree)) and time.monotonic() < deadline:
            time.sleep(STOP_POLL_S)
    finally:  # even on a second Ctrl-C
        for left in filter(_lives, tree):
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait()
        psutil.wait_procs(tree, STOPPED_WITHIN_S)


@dataclass(frozen=True)
class ProcessMemory:
    pid: int
    name: str
    bytes: int  # not shared with any other process (USS)

    @property
    def is_replica(self) -> bool:
        return self.name.startswith("ServeReplica:")


def memory(process: psutil.Popen) -> list[ProcessMemory]:
    """The memory of each process of the tree; mapped files in the kernel's cache do not count."""
    found = []
    for member in _tree(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            used = member.memory_full_info().uss
            found.append(ProcessMemory(member.pid, _name(member.cmdline()), used))
    return found


def cpu_seconds(process: psutil.Popen) -> dict[tuple[int, str], float]:
    """The CPU time of each process of the tree so far, by pid and name."""
    found = {}
    for member in _tree(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = member.cpu_times()
            found[member.pid, _name(member.cmdline())] = times.user + times.system
    return found


class PeakMemory:
    """While entered, samples the memory of a process tree every five seconds.

    `peak` is the largest sum in bytes, Ray's own processes included; None without a process.
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
        while not self._done.wait(SAMPLE_EVERY_S):
            used = sum(member.bytes for member in memory(self._process))
            self.peak = max(used, self.peak or 0)


def tail(log: Path) -> str:
    """Its last lines, of which a traceback's may be long."""
    last = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    return "\n".join([f"the end of {log}:", *(line[:LOG_COLUMNS] for line in last)])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(process: psutil.Popen, url: str, log: Path, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerFailed(f"it exited with {process.returncode}; {tail(log)}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready", timeout=5, trust_env=False).is_success:
                return
        time.sleep(READY_POLL_S)
    raise ServerFailed(f"not ready after {within_s:g} s; {tail(log)}")


def _model(url: str) -> str:
    """The first model that a server lists."""
    try:
        trust = not is_loopback(url)
        answer = httpx.get(f"{url}/models", headers=key_headers(), timeout=30, trust_env=trust)
        name: str = answer.raise_for_status().json()["data"][0]["id"]
    except httpx.HTTPError as error:
        raise ServerFailed(f"no list of models at {url}: {error}") from None
    return name


def _name(command: list[str]) -> str:
    """A process's name: the class of an actor, the script, or the program."""
    first = command[0].strip() if command else "?"
    if first.startswith("ray::"):
        return first.removeprefix("ray::").partition(".")[0]  # without the running method
    scripts = [Path(part).stem for part in command if part.endswith(".py")]
    return scripts[0] if scripts else Path(first).name


def _tree(process: psutil.Popen | None) -> list[psutil.Process]:
    try:
        root = psutil.Process(process.pid) if process else None
        return [root, *root.children(recursive=True)] if root else []
    except psutil.NoSuchProcess:
        return []


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
