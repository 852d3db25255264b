"""`blip2-serve up` behind HAProxy: answers, errors, cancellation, open ports, lost replicas."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

from blip2_serve.demo import scenes
from support.images import data_url, encode, image_message
from support.server import wait_until
from support.stopping import stop_with_a_stream_under_way
from support.up import Up, listening, running_up

SCENE = scenes.sample(6_001)
LONG = {"image": data_url(SCENE.image), "max_tokens": 450, "ignore_eos": True}
SHORT = {**LONG, "max_tokens": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("haproxy")
    config = folder / "config.yaml"
    # One sequence at a time: a request in the engine keeps the next one waiting.
    one = {"generator": {"max_num_seqs": 1}, "ingress": {"num_replicas": 2}}
    config.write_text(yaml.safe_dump(one))
    with running_up(folder, "--config", config) as server:
        yield server


def test_a_caption_and_its_stream_piece_by_piece(server: Up) -> None:
    body = {"messages": [image_message(SCENE.image)]}
    whole = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    assert whole["choices"][0]["message"]["content"] == SCENE.caption

    stream = {**body, "stream": True, "max_tokens": 200, "ignore_eos": True}
    # A slow client may find the whole answer at its first read; behind a buffering proxy, all do.
    reads = [_reads(server, stream) for _ in range(5)]
    assert all(_streamed_text(b"".join(read)).startswith(SCENE.caption) for read in reads)
    assert any(b"[DONE]" not in read[0] and len(read) > 20 for read in reads)


def _reads(server: Up, body: dict[str, object]) -> list[bytes]:
    """Returns the pieces that the answer's socket yielded, read by read."""
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as answer:
        return [*answer.iter_raw()]


def _streamed_text(events: bytes) -> str:
    lines = [line for line in events.decode().splitlines() if line.startswith("data: {")]
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def test_an_image_above_four_megabytes(server: Up) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1600, 1700, 3), dtype=np.uint8)
    png = encode(Image.fromarray(noise), compress_level=0)
    assert len(png) > 8_000_000
    answer = httpx.post(f"{server.url}/v1/caption", files={"image": png}, timeout=60)
    assert answer.status_code == httpx.codes.OK, answer.text
    answer = httpx.post(f"{server.url}/v1/caption", json={"image": data_url(png)}, timeout=60)
    assert answer.status_code == httpx.codes.OK, answer.text


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"image": data_url(b"I am a PNG")}, "image"),  # refused by the preprocessor
        ({"prompt": "red " * 600}, "prompt"),  # by the generator
        ({"best_of": 2}, "best_of"),  # by the ingress
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_has_openais_shape(
    change: dict[str, object], param: str, stream: bool, server: Up
) -> None:
    body = {**SHORT, **change, "stream": stream}
    answer = httpx.post(f"{server.url}/v1/generate", json=body, timeout=60)
    assert answer.status_code == 400, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("limit", ["0.005", "0.05", "0.2"])
def test_a_request_that_runs_out_of_time_gets_openais_error(
    limit: str, stream: bool, server: Up
) -> None:
    headers = {"x-request-timeout-seconds": limit}
    url = f"{server.url}/v1/generate"
    answer = httpx.post(url, json={**LONG, "stream": stream}, headers=headers, timeout=60)
    if answer.status_code == httpx.codes.OK:
        assert stream
        event = answer.text.rstrip().split("\n\n")[-1].removeprefix("data: ")
        assert json.loads(event)["error"]["code"] in ("timeout", "unavailable")
    else:
        assert answer.status_code == httpx.codes.REQUEST_TIMEOUT, answer.text
        assert answer.json()["error"]["code"] == "timeout"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_request_whose_time_is_over_in_the_queue_is_a_408(stream: bool, server: Up) -> None:
    """It is dropped there, and nobody should send it again."""
    before = _total(server, "blip2_expired_total")
    url, headers = f"{server.url}/v1/generate", {"x-request-timeout-seconds": "0.3"}

    def expires() -> bool:
        with _queue(server):
            answer = httpx.post(url, json={**LONG, "stream": stream}, headers=headers, timeout=60)
        assert answer.status_code in (408, 429), answer.text  # 429: it would have come too late
        if answer.status_code == 408:
            assert answer.json()["error"]["code"] == "timeout"
            assert answer.headers["x-should-retry"] == "false"
        return answer.status_code == 408

    wait_until(expires)
    wait_until(lambda: _total(server, "blip2_expired_total") > before)
    httpx.post(url, json=SHORT, timeout=60).raise_for_status()


@contextlib.contextmanager
def _queue(server: Up) -> Iterator[None]:
    """Keeps the engine busy during the block, for some seconds at most."""
    with contextlib.ExitStack() as stack:
        for number in range(5):
            body = {**LONG, "stream": True, "prompt": f"number {number}"}
            client = stack.enter_context(httpx.Client(timeout=60))
            url = f"{server.url}/v1/generate"
            thread = threading.Thread(target=client.post, args=(url,), kwargs={"json": body})
            thread.start()
            stack.callback(thread.join)
        yield


def test_a_stream_whose_time_is_over_ends_with_an_error(server: Up) -> None:
    url = f"{server.url}/v1/generate"

    def is_cut() -> bool:
        """Whether the first token came in time, and the last did not."""
        for limit in ("0.3", "0.5", "0.8", "1.2"):
            headers = {"x-request-timeout-seconds": limit}
            answer = httpx.post(url, json={**LONG, "stream": True}, headers=headers, timeout=60)
            *events, last = answer.text.rstrip().split("\n\n")
            if answer.status_code == 200 and events and last != "data: [DONE]":
                assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
                return True
        return False

    wait_until(is_cut)


@pytest.mark.parametrize("leave", ["while waiting", "while streaming"])
def test_the_request_of_a_client_that_goes_away_is_dropped(leave: str, server: Up) -> None:
    before = _dropped(server)

    def dropped_after_leaving() -> bool:
        _go_away(f"{server.url}/v1/generate", leave)
        return _dropped(server) > before

    wait_until(dropped_after_leaving)
    httpx.post(f"{server.url}/v1/generate", json=SHORT, timeout=60).raise_for_status()


def _go_away(url: str, leave: str) -> None:
    if leave == "while streaming":
        with httpx.stream("POST", url, json={**LONG, "stream": True}) as response:
            next(response.iter_lines())
    else:
        with contextlib.suppress(httpx.ReadTimeout):  # a quick answer comes in time
            httpx.post(url, json=LONG, timeout=0.1)


def _total(server: Up, name: str) -> float:
    """What the generator's counter of this name says so far."""
    page = httpx.get(f"{server.url}/metrics", timeout=60).text
    lines = re.findall(rf'^ray_{name}\{{.*stage="generator".*\}} (.+)$', page, re.M)
    return sum(map(float, lines))


def _dropped(server: Up) -> float:
    """How many requests the generator has dropped because their clients had left."""
    return _total(server, "blip2_dropped_total")


def test_nothing_listens_beyond_loopback(server: Up) -> None:
    """Ray CVE-2026-27482: its dashboard ran what anybody sent."""
    assert listening(server.family()) == {}


def test_statistics_and_metrics_of_haproxy_are_served(server: Up) -> None:
    config = _haproxy_config(server).read_text()
    ports = [int(port) for port in re.findall(r"bind 127\.0\.0\.1:(\d+)", config)]
    assert len(ports) == 3
    pages = [
        httpx.get(f"http://127.0.0.1:{port}{path}", timeout=60)
        for port, path in zip((ports[0], ports[2]), ("/metrics", "/stats"), strict=True)
    ]
    assert all(page.is_success for page in pages)


def test_requests_on_this_machine_bypass_the_proxy(server: Up) -> None:
    httpx.post(f"{server.url}/v1/generate", json=SHORT, timeout=60).raise_for_status()
    assert server.proxied == []


def test_a_killed_ingress_costs_no_request_that_has_no_answer_yet(server: Up) -> None:
    """Nor any later one: the other replica takes them."""
    url = f"{server.url}/v1/generate"
    answers: list[httpx.Response] = []
    killed = threading.Event()

    def ask() -> None:
        with httpx.Client(timeout=60) as client:
            after = 0
            while after < 5:
                after += killed.is_set()
                answers.append(client.post(url, json={**SHORT, "max_tokens": 20}))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(answers) > 10)
    server.named(":Ingress")[0].kill()
    killed.set()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} == {httpx.codes.OK}
    assert len(answers) > 20
    wait_until(lambda: len(server.named(":Ingress")) == 2, 120)
    assert listening(server.family()) == {}  # after HAProxy was started anew


def _haproxy_config(server: Up) -> Path:
    command = server.named("haproxy")[0].cmdline()
    return Path(command[command.index("-f") + 1])


def test_ctrl_c_finishes_a_stream_and_leaves_no_process_and_no_folder(server: Up) -> None:
    folder = _haproxy_config(server).parents[1]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    stop_with_a_stream_under_way(server, signal.SIGINT, group=True)
    assert not folder.exists()
