"""`up --fast`: each server has its own ports and files; what it cannot do is said at once."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from blip2_serve import fast_mode
from blip2_serve.errors import StartupError

# Runs in a process that has not imported Ray, until its input ends.
SERVER = """
import json, os, sys
from blip2_serve.config import AppConfig
from blip2_serve.fast_mode import profile
before = dict(os.environ)
with profile(AppConfig()):
    print(json.dumps({k: v for k, v in os.environ.items() if before.get(k) != v}), flush=True)
    sys.stdin.read()
assert dict(os.environ) == before
"""


def test_two_servers_share_neither_ports_nor_files() -> None:
    servers = [
        subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        one, two = (json.loads(s.stdout.readline()) for s in servers if s.stdout)
        folders = [_folder(environment) for environment in (one, two)]
        assert folders[0] != folders[1]
        assert all(stat.S_IMODE(folder.stat().st_mode) == 0o700 for folder in folders)
        assert _ports(one).isdisjoint(_ports(two))
        for environment, folder in zip((one, two), folders, strict=True):
            paths = [Path(value) for value in environment.values() if value.startswith("/")]
            assert len(paths) == 6
            assert all(path == folder or folder in path.parents for path in paths)
    finally:
        for server in servers:
            server.communicate(timeout=30)
    assert [server.returncode for server in servers] == [0, 0]
    assert not any(folder.exists() for folder in folders)


def _folder(environment: dict[str, str]) -> Path:
    return Path(environment["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"])


def _ports(environment: dict[str, str]) -> set[int]:
    ports = {int(v) for k, v in environment.items() if k.endswith("_PORT") and "DIRECT" not in k}
    first = int(environment["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"])
    last = int(environment["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"])
    assert len(ports) == 3
    assert last - first > 50
    return ports | set(range(first, last + 1))


def test_a_long_temporary_folder_is_an_error_that_names_the_variable() -> None:
    with pytest.raises(StartupError, match="TMPDIR"):
        fast_mode.check_folder(Path("/tmp/" + "x" * 60))


@pytest.mark.parametrize(
    ("host", "address", "told"),
    [
        ("127.0.0.1", "auto", "--address"),
        ("192.0.2.1", None, "0.0.0.0"),
        ("::1", None, "127.0.0.1"),
    ],
)
def test_a_server_that_cannot_be_fast_is_an_error_that_says_why(
    host: str, address: str | None, told: str
) -> None:
    with pytest.raises(StartupError, match=told):
        fast_mode.check(host, address)


def test_a_missing_haproxy_is_an_error_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", "/absent/haproxy")
    with pytest.raises(StartupError, match="RAY_SERVE_HAPROXY_BINARY_PATH"):
        fast_mode.check("127.0.0.1", None)
