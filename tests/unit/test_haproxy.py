"""HAProxy for `up`: each server has its own ports and files, and listens where it is told to."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from blip2_serve import haproxy
from blip2_serve.errors import StartupError

# Runs in a process that has not imported Ray, until its input ends.
SERVER = """
import json, os, sys
from pathlib import Path
from blip2_serve.haproxy import profile
before = dict(os.environ)
with profile("127.0.0.1", Path(sys.argv[1])):
    print(json.dumps({k: v for k, v in os.environ.items() if before.get(k) != v}), flush=True)
    sys.stdin.read()
assert dict(os.environ) == before
"""


def test_two_servers_share_neither_ports_nor_files() -> None:
    folders = [Path(tempfile.mkdtemp(dir="/tmp")) for _ in range(2)]  # short, for sockets
    servers = [
        subprocess.Popen(
            [sys.executable, "-c", SERVER, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for folder in folders
    ]
    try:
        one, two = (json.loads(s.stdout.readline()) for s in servers if s.stdout)
        assert _ports(one).isdisjoint(_ports(two))
        for environment, folder in zip((one, two), folders, strict=True):
            paths = [Path(value) for value in environment.values() if value.startswith("/")]
            assert len(paths) == 6
            assert all(path == folder or folder in path.parents for path in paths)
    finally:
        for server in servers:
            server.communicate(timeout=30)
        for folder in folders:
            shutil.rmtree(folder)
    assert [server.returncode for server in servers] == [0, 0]


def _ports(environment: dict[str, str]) -> set[int]:
    ports = {int(v) for k, v in environment.items() if k.endswith("_PORT") and "DIRECT" not in k}
    first = int(environment["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"])
    last = int(environment["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"])
    assert len(ports) == 3
    assert last - first > 50
    return ports | set(range(first, last + 1))


def test_a_long_temporary_folder_is_an_error_that_names_the_variable() -> None:
    with pytest.raises(StartupError, match="TMPDIR"):
        haproxy.check_folder(Path("/tmp/" + "x" * 60))


@pytest.mark.parametrize(
    ("address", "platform", "binary", "told"),
    [
        pytest.param("10.0.0.1:6379", "linux", "/bin/true", "10.0.0.1:6379", id="a foreign Ray"),
        pytest.param(None, "darwin", "/bin/true", "Linux", id="another system"),
        pytest.param(None, "linux", "/absent/haproxy", "not found", id="no HAProxy"),
        pytest.param(None, "linux", "/bin/true", None, id="it can run"),
    ],
)
def test_where_haproxy_cannot_run_the_reason_is_said(
    address: str | None,
    platform: str,
    binary: str,
    told: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", binary)
    reason = haproxy.missing(address)
    assert told in reason if told and reason else reason is told


def test_the_haproxy_of_ray_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_SERVE_HAPROXY_BINARY_PATH", raising=False)
    assert haproxy.missing(None) is None


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "0.0.0.0"), ("::1", "[::1]"), ("::", "[::]")],
)
def test_haproxy_gets_a_numeric_address(host: str, address: str) -> None:
    assert haproxy.numeric(host) == address


def test_a_host_without_an_address_is_an_error_that_names_it() -> None:
    with pytest.raises(StartupError, match=r"no-such-host\.invalid.*--host"):
        haproxy.numeric("no-such-host.invalid")
