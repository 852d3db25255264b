"""Runs `blip2-serve up` behind a proxy and from a path with a space."""

from __future__ import annotations

import contextlib
import os
import signal
import socketserver
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import psutil

from support.background import serving
from support.server import free_port, wait_until


@dataclass(frozen=True)
class Up:
    """A server that is ready. `proxy_requests` has the request lines that a proxy received."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    proxy_requests: list[str]

    @property
    def proxied(self) -> list[str]:
        """Requests to the proxy for this machine; Ray also queries metadata services of clouds."""
        addresses = [a.address for found in psutil.net_if_addrs().values() for a in found]
        own = ("localhost", *addresses)
        return [line for line in self.proxy_requests if any(name in line for name in own)]

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def named(self, ending: str) -> list[psutil.Process]:
        """Returns those of its processes whose name ends in `ending`."""
        found = []
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):  # it has exited meanwhile
                if process.name().endswith(ending):
                    found.append(process)
        return found

    def send(self, how: signal.Signals, *, group: bool) -> None:
        """Sends a signal. Terminals and some supervisors send theirs to the process group."""
        if group:
            os.killpg(self.process.pid, how)
        else:
            self.process.send_signal(how)

    def until_gone(self, family: list[psutil.Process]) -> None:
        """Waits until the server, told to stop, and what was its family have exited."""
        assert family
        assert self.process.wait(timeout=60) == 0
        wait_until(lambda: not any(map(_is_alive, family)), within_s=30)


def listening(processes: list[psutil.Process]) -> dict[str, set[int]]:
    """TCP ports on which processes listen beyond loopback, by the process's name."""
    found: dict[str, set[int]] = {}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("tcp"):
                address = ip_address(connection.laddr.ip.removeprefix("::ffff:"))
                if connection.status == psutil.CONN_LISTEN and not address.is_loopback:
                    found.setdefault(process.name(), set()).add(connection.laddr.port)
    return found


@contextmanager
def running_up(folder: Path, *flags: str | Path, **environment: str) -> Iterator[Up]:
    """Runs a server with these flags on a free port; enters the block once it is ready."""
    log, port = folder / "log", free_port()
    own = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with _proxy() as (proxy, requests):
        own |= {f"{kind}_proxy": proxy for kind in ("http", "https", "all")} | environment
        for name in ("no_proxy", "NO_PROXY"):
            own.pop(name, None)
        with log.open("w") as output:
            process = subprocess.Popen(
                [_python(folder), "-m", "blip2_serve", "up", "--port", str(port), *flags],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=own,
                # A terminal also does this, and it hides other clusters from Ray.
                start_new_session=True,
            )
        try:
            wait_until(lambda: "Ctrl-C" in log.read_text() or process.poll() is not None)
            assert "is ready" in log.read_text()
            yield Up(process, f"http://127.0.0.1:{port}", log, requests)
        finally:
            if process.poll() is None:  # not SIGKILL, which would leave its children running
                process.terminate()
                process.wait(timeout=60)
            print(log.read_text())


def _python(folder: Path) -> Path:
    """Returns this interpreter, with all its packages, under a path with a space."""
    environment = folder / "my dir"
    (environment / "bin").mkdir(parents=True)
    python = environment / "bin" / "python3"
    python.symlink_to(Path(sys.executable).resolve())
    for name in ("pyvenv.cfg", "lib"):
        (environment / name).symlink_to(Path(sys.prefix) / name)
    return python


@contextmanager
def _proxy() -> Iterator[tuple[str, list[str]]]:
    """Runs a proxy that rejects everything; yields its URL and the request lines it received."""
    requests: list[str] = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            requests.append(self.rfile.readline().decode())
            self.wfile.write(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n")

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    with serving(server):
        yield f"http://127.0.0.1:{server.server_address[1]}", requests


def _is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
