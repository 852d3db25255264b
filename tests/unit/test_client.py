"""The command line's client: odd URLs, odd answers, and proxies."""

from __future__ import annotations

import http.server
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from blip2_serve.cli import running
from blip2_serve.client import connect, is_loopback, post
from blip2_serve.errors import StartupError

CAPTION = b'{"data": [{"caption": "a cat"}]}'


@dataclass
class Server:
    """Gives the same answer to every request."""

    status: int = 200
    body: bytes = CAPTION
    url: str = ""
    asked: list[str] = field(default_factory=list)


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.asked.append(self.path)
            self.send_response(server.status)
            self.send_header("content-length", str(len(server.body)))
            self.end_headers()
            self.wfile.write(server.body)

        do_POST = do_GET  # noqa: N815 (the base class's name)

        def log_message(self, *_: object) -> None:
            pass

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
    thread.start()
    server.url = f"http://127.0.0.1:{listener.server_port}"
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()


def caption(url: str) -> str:
    with connect(url) as server:
        return post(server, "/v1/caption", {}, lambda answer: answer["data"][0]["caption"])


@pytest.mark.parametrize("end", ["", "/", "//"])
def test_a_slash_at_the_end_of_the_url_makes_no_difference(end: str) -> None:
    with serving(Server()) as server:
        assert caption(server.url + end) == "a cat"
        assert caption(f"{server.url}/prefix{end}") == "a cat"
    assert server.asked == ["/v1/caption", "/prefix/v1/caption"]


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        pytest.param(400, b'{"error": {"message": "no image"}}', "no image", id="its own error"),
        pytest.param(502, b"<html>Bad Gateway</html>", "502", id="a page of a proxy"),
        pytest.param(404, b"", "404", id="nothing"),
        pytest.param(404, b'{"detail": "Not Found"}', "404", id="the error of another server"),
        pytest.param(200, b'{"text": "hello"}', "200", id="the answer of another server"),
        pytest.param(200, b"hello", "200", id="an answer that is not JSON"),
    ],
)
def test_an_answer_without_a_caption_is_an_error_of_one_line(
    status: int, body: bytes, told: str
) -> None:
    with serving(Server(status, body)) as server, pytest.raises(StartupError) as error:
        caption(server.url)
    assert told in error.value.message
    assert "\n" not in error.value.message


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://a.b", "http://", "", "a b"])
def test_an_invalid_url_is_an_error_that_shows_a_valid_one(url: str) -> None:
    with pytest.raises(StartupError, match=r"http://127\.0\.0\.1:8000"):
        connect(url)


def test_a_missing_server_is_an_error_that_names_the_command_to_start_one() -> None:
    with pytest.raises(StartupError, match="blip2-serve up"):
        caption("http://127.0.0.1:9")


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_a_proxy_is_used_for_other_machines_only(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Server(body=b"{}")) as proxy, serving(Server()) as server:
        monkeypatch.setenv(name, proxy.url)
        assert caption(server.url) == "a cat"
        assert proxy.asked == []
        with pytest.raises(StartupError):
            caption("http://example.invalid")
        with connect("http://example.invalid", on_this_machine=True) as client:
            assert not client.trust_env
    assert proxy.asked == ["http://example.invalid/v1/caption"]


def test_wrong_proxy_settings_are_an_error_that_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy:port")
    with pytest.raises(StartupError, match="proxy settings"):
        connect("https://example.com")


def test_a_socks_proxy_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:9")
    connect("https://example.com").close()


@pytest.mark.parametrize(
    ("url", "loopback"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://127.8.8.8", True),
        ("http://localhost/v1", True),
        ("http://[::1]:8000", True),
        ("http://192.168.0.1", False),
        ("https://example.com", False),
        ("no url", False),
    ],
)
def test_the_host_decides_whether_a_url_is_loopback(url: str, loopback: bool) -> None:
    assert is_loopback(url) == loopback


def test_waiting_for_a_server_ends_in_time_even_if_it_never_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = 0.0

    class Hanging(httpx.Client):
        def get(self, *_: Any, timeout: Any = 0, **__: Any) -> httpx.Response:
            nonlocal seconds
            seconds += timeout
            raise httpx.ReadTimeout("no answer")

    def sleep(more: float) -> None:
        nonlocal seconds
        seconds += more

    clock = types.SimpleNamespace(monotonic=lambda: seconds, sleep=sleep)
    monkeypatch.setattr(running, "time", clock)
    with pytest.raises(StartupError) as error:
        running.wait_until_ready(Hanging(), within_s=60)
    assert "within 60 seconds" in error.value.message
    assert 60 <= seconds < 70


def test_the_key_of_the_environment_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BLIP2_API_KEY", raising=False)
    with connect("http://127.0.0.1:8000") as server:
        assert "authorization" not in server.headers
    monkeypatch.setenv("BLIP2_API_KEY", "blip2-secret")
    with connect("http://127.0.0.1:8000") as server:
        assert server.headers["authorization"] == "Bearer blip2-secret"
