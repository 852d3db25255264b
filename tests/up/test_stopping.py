"""`blip2-serve up` is told to stop while it works, and to listen on other addresses."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import httpx
import pytest

from blip2_serve.demo import scenes
from support.images import data_url
from support.server import is_successful, wait_until
from support.up import listening, running_up

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


@pytest.mark.parametrize("group", [False, True], ids=["the process", "its group"])
def test_a_stream_is_finished_and_new_requests_are_refused(tmp_path: Path, group: bool) -> None:
    with running_up(tmp_path, "--host", "0.0.0.0") as server:
        assert listening(server.family()) == {"haproxy": {int(server.url.rpartition(":")[2])}}
        stream = Stream(server.url)
        if group:
            os.killpg(server.process.pid, signal.SIGTERM)
        else:
            server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not is_successful(f"{server.url}/ready"))
        assert stream.lines[-1] != "data: [DONE]"
        refused = httpx.post(f"{server.url}/v1/generate", json=BODY, timeout=60)
        assert refused.status_code == httpx.get(f"{server.url}/ready").status_code == 503
        assert refused.json()["error"]["code"] == "unavailable"
        assert refused.headers["retry-after"] == "1"
        stream.join()
        assert stream.lines[-1] == "data: [DONE]"
        assert server.process.wait(timeout=60) == 0
        assert "Traceback" not in server.log.read_text()
