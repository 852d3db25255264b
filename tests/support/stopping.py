"""Stops a server while it works."""

from __future__ import annotations

import signal
import threading

import httpx

from blip2_serve.demo import scenes
from support.images import data_url
from support.server import is_successful, wait_until
from support.up import Up

BODY = {
    "image": data_url(scenes.sample(6_002).image),
    "max_tokens": 450,
    "ignore_eos": True,
    "stream": True,
}


class Stream:
    """A streamed answer, read by a thread."""

    def __init__(self, url: str) -> None:
        self.lines: list[str] = []
        self.error: httpx.HTTPError | None = None
        self._thread = threading.Thread(target=self._read, args=(url,))
        self._thread.start()
        wait_until(lambda: self.lines)

    def _read(self, url: str) -> None:
        try:
            with httpx.stream("POST", f"{url}/v1/generate", json=BODY, timeout=120) as answer:
                self.lines += filter(None, answer.iter_lines())
        except httpx.HTTPError as error:
            self.error = error

    def join(self) -> None:
        self._thread.join()


def stop_with_a_stream_under_way(server: Up, how: signal.Signals, *, group: bool) -> None:
    """Asserts that the stream is finished, new requests are refused, and no process is left."""
    family = server.family()
    stream = Stream(server.url)
    server.send(how, group=group)
    wait_until(lambda: not is_successful(f"{server.url}/ready"))
    assert stream.lines[-1] != "data: [DONE]"
    refused = httpx.post(f"{server.url}/v1/generate", json=BODY, timeout=60)
    assert refused.status_code == httpx.get(f"{server.url}/ready").status_code == 503
    assert refused.json()["error"]["code"] == "unavailable"
    assert refused.headers["retry-after"] == "1"
    stream.join()
    assert stream.lines[-1] == "data: [DONE]", stream.error
    server.until_gone(family)
    assert "Traceback" not in server.log.read_text()
