"""What HAProxy gets to read: Ray Serve's configuration, corrected."""

from __future__ import annotations

import http.server
import json
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from email.message import Message
from pathlib import Path

import httpx
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
from blip2_serve.haproxy_config import BODY_TIMEOUT_S, ERRORS, PEER, answer, correct
from support.background import serving
from support.server import free_port, wait_until


def serves_configuration(
    folder: Path, port: int = 18_000, replicas: Sequence[int] = (20_000, 20_001)
) -> Path:
    """Writes a configuration as Ray Serve does, for an application with ingress replicas."""
    path = folder / "haproxy.cfg"
    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        socket_path=str(folder / "s"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        metrics_socket_path=str(folder / "m"),
        metrics_port=port + 1,
        stats_port=port + 2,
        has_received_routes=True,
        retry_on="conn-failure empty-response",
        observe_error_limit=1,
        bufsize=262_144,
    )
    servers = [ServerConfig(f"replica-{n}", "127.0.0.1", n) for n in replicas]
    backend = BackendConfig("http-blip2", "/", servers=servers, app_name="blip2")
    backends = {"http-blip2": backend} if replicas else {}
    HAProxyApi(config, backends, str(path))._generate_config_file_internal()
    return path


def binds(config: Path) -> dict[int, str]:
    """The address of each port that HAProxy would listen on."""
    lines = [x.split()[1] for x in config.read_text().splitlines() if x.strip().startswith("bind ")]
    return {int(port): address for address, _, port in (x.rpartition(":") for x in lines)}


def is_valid(config: Path) -> bool:
    done = subprocess.run(
        [get_haproxy_binary(), "-c", "-f", config], capture_output=True, text=True
    )
    return done.returncode == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "[::1]", "[::]"])
def test_only_the_servers_port_is_on_its_host(host: str, tmp_path: Path) -> None:
    config = serves_configuration(tmp_path)
    assert "*" in binds(config).values()
    correct(config, host)
    assert binds(config) == {18_000: host, 18_001: "127.0.0.1", 18_002: "127.0.0.1"}
    assert is_valid(config)


def test_without_a_host_only_the_statistics_move_to_loopback(tmp_path: Path) -> None:
    config = serves_configuration(tmp_path)
    before = binds(config)
    correct(config, None)
    assert binds(config) == {**before, 18_002: "127.0.0.1"}
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
    assert ("x-should-retry: false" in lines) == (ERRORS[status].status == 408)


# -- HAProxy itself --------------------------------------------------------------------------------


class Replica:
    """Answers 200 to health checks; each other request it reads, and closes if it is `dying`."""

    def __init__(self, *, dying: bool, media_type: str = "application/json") -> None:
        self.requests = 0
        self.headers = Message()  # of the last one
        self._media_type = media_type

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            close_connection = False

            def do_GET(handler) -> None:  # noqa: N805
                self._respond(handler)

            def do_POST(handler) -> None:  # noqa: N805
                handler.rfile.read(int(handler.headers["content-length"]))
                self.requests += 1
                self.headers = handler.headers
                if dying:
                    handler.close_connection = True
                else:
                    self._respond(handler)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = int(self._server.server_address[1])

    def running(self) -> AbstractContextManager[None]:
        return serving(self._server)

    def _respond(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-type", self._media_type)
        handler.send_header("content-length", "0")
        handler.end_headers()


@contextmanager
def haproxy(replicas: Sequence[int], body_timeout_s: float = BODY_TIMEOUT_S) -> Iterator[str]:
    """Runs HAProxy with a corrected configuration of Ray Serve; yields its URL."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # short, for sockets
        port = next(port for port in iter(free_port, 0) if port < 65_000)  # two more follow it
        config = serves_configuration(Path(name), port, replicas)
        binary = get_haproxy_binary()
        command = write_command(Path(name) / "command", binary, "127.0.0.1", body_timeout_s)
        process = subprocess.Popen([command, "-db", "-f", config])
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until(lambda: is_answered(f"{url}/-/routes"))
            yield url
        finally:
            process.kill()
            process.wait()


def is_answered(url: str) -> bool:
    try:
        httpx.get(url)
    except httpx.TransportError:
        return False
    return True


def code_of(answer: httpx.Response) -> str:
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers.get("retry-after") == ("1" if answer.status_code == 503 else None)
    code: str = answer.json()["error"]["code"]
    return code


@pytest.mark.parametrize("replicas", [[], [9]], ids=["no application", "no replica"])
def test_without_a_replica_the_client_gets_openais_error(replicas: list[int]) -> None:
    with haproxy(replicas) as url:
        answer = httpx.post(f"{url}/v1/generate", content=b"x", timeout=60)
    assert answer.status_code == 503
    assert code_of(answer) == "unavailable"


def test_if_every_replica_dies_the_client_gets_openais_error() -> None:
    replica = Replica(dying=True)
    with replica.running(), haproxy([replica.port]) as url:
        answer = httpx.post(f"{url}/v1/generate", content=b"x" * 1_000_000, timeout=60)
    assert answer.status_code == 503
    assert code_of(answer) == "unavailable"
    assert "lost" in answer.json()["error"]["message"]
    assert replica.requests == 1  # it is too large to be sent again


def test_a_body_that_does_not_arrive_in_time_is_a_408_and_never_seen_by_a_replica() -> None:
    replica = Replica(dying=False)
    with replica.running(), haproxy([replica.port], body_timeout_s=0.2) as url:
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            client.sendall(b"POST /v1 HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf")
            received = b"".join(iter(lambda: client.recv(65_536), b""))
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert json.loads(body)["error"]["code"] == "timeout"
    assert replica.requests == 0


def test_a_request_of_a_dead_replica_goes_to_another_one() -> None:
    dying, other = Replica(dying=True), Replica(dying=False)
    with (
        dying.running(),
        other.running(),
        haproxy([dying.port, other.port]) as url,
        httpx.Client(timeout=60) as client,
    ):
        answers = [client.post(f"{url}/v1", content=b"x" * 200_000) for _ in range(6)]
    assert {answer.status_code for answer in answers} == {200}
    assert other.requests == 6
    assert dying.requests > 0


@pytest.mark.parametrize(
    ("media_type", "closes"),
    [("text/event-stream; charset=utf-8", True), ("application/json", False)],
)
def test_a_connection_ends_with_a_stream_on_it(media_type: str, closes: bool) -> None:
    replica = Replica(dying=False, media_type=media_type)
    with (
        replica.running(),
        haproxy([replica.port]) as url,
        httpx.Client(timeout=60) as client,
    ):
        answers = [client.post(f"{url}/v1/generate", content=b"x") for _ in range(2)]
    assert [a.headers.get("connection") for a in answers] == ["close" if closes else None] * 2
    assert replica.requests == 2


def test_the_application_is_told_who_connected_whatever_the_client_says() -> None:
    replica = Replica(dying=False)
    with replica.running(), haproxy([replica.port]) as url:
        httpx.post(f"{url}/v1/generate", content=b"x", headers={PEER: "192.0.2.1"}, timeout=60)
    assert replica.headers.get_all(PEER) == ["127.0.0.1"]
