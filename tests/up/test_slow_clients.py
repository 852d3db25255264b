"""`blip2-serve up`: bodies that come slowly, without a length, or are too large; no controller."""

from __future__ import annotations

import contextlib
import json
import re
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest
import yaml

from blip2_serve.demo import scenes
from support.images import data_url
from support.server import is_successful, wait_until
from support.up import Up, running_up

pytestmark = pytest.mark.long  # clients are slow
SLOW, MANY = 64, 1000
BODY_TIMEOUT_S = 10
HELD_BYTES = 24 << 20
SCENE = scenes.sample(6_003)
SHORT = {"image": data_url(SCENE.image), "max_tokens": 3}
BUFFER_BYTES = 300_000  # more than HAProxy's: it passes such a request on before it is complete


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("slow")
    config = folder / "config.yaml"
    admission = {
        "body_timeout_s": BODY_TIMEOUT_S,
        "max_held_bytes": HELD_BYTES,
        "max_wait_s": 0.2,  # so that slow requests would keep the others out if they counted
    }
    config.write_text(yaml.safe_dump({"ingress": {"admission": admission}}))
    with running_up(folder, "--config", config) as server:
        yield server


class Dripping:
    """A client that has sent the beginning of a body and sends a byte now and then."""

    def __init__(self, url: str, begin: int) -> None:
        port = int(url.rpartition(":")[2])
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        head = f"POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Length: {begin + 10_000}\r\n\r\n"
        self._socket.sendall(head.encode() + b" " * begin)

    def drip(self) -> bool:
        """Sends a byte; returns whether the server still listens."""
        try:
            self._socket.sendall(b" ")
        except OSError:
            return False
        return True

    def is_answered(self) -> bool:
        return bool(select.select([self._socket], [], [], 0)[0])

    def answer(self) -> tuple[bytes, bytes]:
        """The head and the body that the server answers."""
        received = b""
        while b"\r\n\r\n" not in received or not received.endswith(b"}"):
            if not (more := self._socket.recv(65_536)):
                break
            received += more
        head, _, body = received.partition(b"\r\n\r\n")
        return head, body

    def close(self) -> None:
        self._socket.close()


@contextmanager
def dripping(url: str, begins: list[int]) -> Iterator[list[Dripping]]:
    """Clients that drip during the block, those who got an answer excepted."""
    ended = threading.Event()
    with ExitStack() as stack:
        clients = [Dripping(url, begin) for begin in begins]
        for client in clients:
            stack.callback(client.close)

        def drip() -> None:
            listening = clients
            while listening and not ended.wait(0.2):
                listening = [client for client in listening if client.drip()]

        thread = threading.Thread(target=drip)
        thread.start()
        stack.callback(thread.join)
        stack.callback(ended.set)
        yield clients


def post(server: Up, content: bytes | Iterator[bytes]) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/generate", content=content, timeout=60)


def pieces(body: bytes, size: int = 65_536) -> Iterator[bytes]:
    """Sent like this, a body has no length."""
    for start in range(0, len(body), size):
        yield body[start : start + size]


def test_slow_clients_keep_nobody_out_and_get_a_408(server: Up) -> None:
    begins = [BUFFER_BYTES, 10] * (SLOW // 2)
    short = json.dumps(SHORT).encode()
    with dripping(server.url, begins) as clients:
        # Before they turn out to be slow they count as work, and some may be refused themselves.
        wait_until(lambda: post(server, short).status_code == httpx.codes.OK)
        for _ in range(20):
            answer = post(server, short)
            assert answer.status_code == httpx.codes.OK, answer.text
        some = SLOW // 2 + 7  # those that HAProxy holds, and some others
        assert sum(not client.is_answered() for client in clients) >= some
        answers = [client.answer() for client in clients]
    codes = [json.loads(body)["error"]["code"] for _, body in answers]
    assert {head.split()[1] for head, _ in answers} <= {b"408", b"429"}
    assert {*codes} <= {"timeout", "overloaded"}
    assert codes.count("timeout") >= some


HEAD = b"POST /v1/generate HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("begin", "drop"),
    [
        pytest.param(b"", b"", id="say nothing"),
        pytest.param(HEAD + b"X-Slow: ", b"a", id="send their heads slowly"),
        pytest.param(HEAD + b"Content-Length: 9999\r\n\r\n{", b" ", id="send their bodies slowly"),
    ],
)
def test_a_thousand_connections_keep_nobody_out(begin: bytes, drop: bytes, server: Up) -> None:
    port = int(server.url.rpartition(":")[2])
    with ExitStack() as stack:
        connections = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            for _ in range(MANY)
        ]
        for number in range(20):
            for connection in connections:
                with contextlib.suppress(OSError):  # closed by now
                    connection.sendall(drop if number else begin)
            answer = post(server, json.dumps(SHORT).encode())
            assert answer.status_code == httpx.codes.OK, answer.text
    assert is_successful(f"{server.url}/ready")


def test_a_body_without_a_length_is_answered(server: Up) -> None:
    long = json.dumps({**SHORT, "user": "x" * 2_000_000}).encode()
    for body in (json.dumps(SHORT).encode(), long):
        whole, chunked = post(server, body), post(server, pieces(body, 1 + len(body) // 7))
        assert whole.status_code == chunked.status_code == httpx.codes.OK, chunked.text
        assert whole.json()["choices"] == chunked.json()["choices"]


@pytest.mark.parametrize("send", [bytes, pieces], ids=["with a length", "without"])
def test_a_refused_client_that_sends_20_megabytes_sees_why(
    send: Callable[[bytes], bytes | Iterator[bytes]], server: Up
) -> None:
    body = json.dumps({**SHORT, "user": "x" * (20 << 20)}).encode()
    with dripping(server.url, [3_000_000] * 2):
        wait_until(lambda: post(server, send(body)).status_code == 429)
        answer = post(server, send(body))
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "overloaded"
    assert int(answer.headers["retry-after"]) >= 1


def test_a_body_above_the_limit_is_a_413(server: Up) -> None:
    answer = post(server, json.dumps({**SHORT, "user": "x" * (65 << 20)}).encode())
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


def test_what_a_killed_ingress_had_started_stops(server: Up) -> None:
    before, body = dropped(server), {**SHORT, "max_tokens": 450, "ignore_eos": True}
    begun: list[int] = []

    def ask(number: int) -> None:
        many = {**body, "n": 8, "temperature": 1, "prompt": f"{number}", "stream": True}
        url = f"{server.url}/v1/generate"
        with (
            contextlib.suppress(httpx.HTTPError),
            httpx.stream("POST", url, json=many, timeout=60) as answer,
        ):
            for line in answer.iter_lines():
                if line and number not in begun:
                    begun.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(begun) == len(threads))
    next(p for p in server.family() if p.name().endswith(":Ingress")).kill()
    for thread in threads:
        thread.join()
    wait_until(lambda: is_successful(f"{server.url}/ready"))
    wait_until(lambda: dropped(server) >= before + len(threads))


def dropped(server: Up) -> float:
    """How many requests the generator has dropped because their clients had left."""
    page = httpx.get(f"{server.url}/metrics", timeout=60).text
    lines = re.findall(r'^ray_blip2_dropped_total\{.*stage="generator".*\} (.+)$', page, re.M)
    return sum(map(float, lines))


def test_serving_goes_on_without_the_controller(server: Up) -> None:
    def controllers() -> list[int]:
        family = server.family()
        return [p.pid for p in family if p.name().startswith("ray::ServeContro")]

    (first,) = controllers()
    answers: list[int] = []

    def ask() -> None:
        answers.append(post(server, json.dumps(SHORT).encode()).status_code)

    for _ in range(5):
        ask()
    next(p for p in server.family() if p.pid == first).send_signal(signal.SIGKILL)

    def is_back() -> bool:
        ask()
        return bool(controllers()) and first not in controllers()

    wait_until(is_back)
    for _ in range(20):
        ask()
    assert {*answers} == {httpx.codes.OK}
