"""What HAProxy gets to read: Ray Serve's configuration, corrected."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from ray.serve._private.haproxy import (
    BackendConfig,
    HAProxyApi,
    HAProxyConfig,
    ServerConfig,
    get_haproxy_binary,
)
from ray.serve.config import HTTPOptions

from blip2_serve.haproxy import write_command
from blip2_serve.haproxy_config import ERRORS, answer, correct


def serves_configuration(folder: Path) -> Path:
    """Writes a configuration as Ray Serve does, for an application with two ingress replicas."""
    path = folder / "haproxy.cfg"
    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=18_000),
        socket_path=str(folder / "s"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        metrics_socket_path=str(folder / "m"),
        metrics_port=19_101,
        stats_port=18_404,
        has_received_routes=True,
    )
    servers = [ServerConfig(f"replica-{n}", "127.0.0.1", 20_000 + n) for n in range(2)]
    backend = BackendConfig("http-blip2", "/", servers=servers, app_name="blip2")
    HAProxyApi(config, {"http-blip2": backend}, str(path))._generate_config_file_internal()
    return path


def binds(config: Path) -> dict[int, str]:
    """The address of each port that HAProxy would listen on."""
    lines = [x.split()[1] for x in config.read_text().splitlines() if x.strip().startswith("bind ")]
    return {int(port): address for address, _, port in (x.rpartition(":") for x in lines)}


def is_valid(config: Path) -> bool:
    done = subprocess.run(
        [get_haproxy_binary(), "-c", "-f", config], capture_output=True, text=True
    )
    print(done.stderr)
    return done.returncode == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "[::1]", "[::]"])
def test_only_the_servers_port_is_on_its_host(host: str, tmp_path: Path) -> None:
    config = serves_configuration(tmp_path)
    assert "*" in binds(config).values()
    correct(config, host)
    assert binds(config) == {18_000: host, 19_101: "127.0.0.1", 18_404: "127.0.0.1"}
    assert is_valid(config)


def test_without_a_host_only_the_statistics_move_to_loopback(tmp_path: Path) -> None:
    config = serves_configuration(tmp_path)
    before = binds(config)
    correct(config, None)
    assert binds(config) == {**before, 18_404: "127.0.0.1"}
    assert is_valid(config)


def test_a_corrected_configuration_stays_as_it_is(tmp_path: Path) -> None:
    config = serves_configuration(tmp_path)
    correct(config, "[::]")
    once = config.read_text()
    correct(config, "[::]")
    assert config.read_text() == once


def test_the_path_is_kept_for_ray_serve_which_knows_its_processes_by_it(tmp_path: Path) -> None:
    config = serves_configuration(tmp_path)
    command = write_command(tmp_path / "command", "/bin/echo", "127.0.0.1")
    run = [command, "-db", "-f", config, "-sf", "12", "-x", "socket"]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["-dS", "-db", "-f", str(config), "-sf", "12", "-x", "socket"]
    assert set(binds(config).values()) == {"127.0.0.1"}
    assert f"errorfile 503 {tmp_path}" in config.read_text()


def test_the_command_works_in_any_folder(tmp_path: Path) -> None:
    """Modules beside it must not take the place of Python's."""
    (tmp_path / "types.py").write_text("raise SystemExit('the wrong module')")
    config = serves_configuration(tmp_path)
    command = write_command(tmp_path / "command", "/bin/true", "127.0.0.1")
    subprocess.run([command, "-f", config], cwd=tmp_path, check=True)


@pytest.mark.parametrize("status", ERRORS)
def test_errors_have_openais_shape(status: int) -> None:
    head, _, body = answer(ERRORS[status]).decode().partition("\r\n\r\n")
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    lines = head.split("\r\n")
    assert f"Content-Length: {len(body)}" in lines
    assert lines[0].startswith(f"HTTP/1.1 {ERRORS[status].status} ")
    assert ("Retry-After: 1" in lines) == (ERRORS[status].status == 503)
