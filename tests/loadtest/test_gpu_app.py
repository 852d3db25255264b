"""The application's GPU benchmark: its parts, and all of it on a CPU (with figures of no worth)."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from PIL import Image

from loadtest.bench import gpu_server
from loadtest.bench.client import Answer, Window
from loadtest.bench.gpu_clients import Bodies, Clients, ClientsFailed, Span
from loadtest.bench.gpu_report import asked, head, lines, row_of
from loadtest.bench.gpu_server import Usage
from loadtest.bench.workload import picture
from support.fake_server import chunk, serving, streaming, usage, whole

ROOT = Path(__file__).parents[2]


def image_of(body: bytes) -> bytes:
    url: str = json.loads(body)["messages"][0]["content"][0]["image_url"]["url"]
    return base64.b64decode(url.removeprefix("data:image/jpeg;base64,"), validate=True)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_every_body_has_a_new_image_with_the_pixels_of_one_in_stock() -> None:
    stock = [picture(np.random.default_rng(number)) for number in range(2)]
    first, second = (Bodies("m", stock, 16, name) for name in (b"0000", b"0001"))
    sent = [bodies.next(stream=True) for bodies in (first, second) for _ in range(4)]

    images = [image_of(body) for body in sent]
    assert len(set(images)) == 8
    for number, image in enumerate(images):
        assert np.array_equal(pixels(image), pixels(stock[number % 2]))
    body = json.loads(sent[0])
    assert (body["max_tokens"], body["stream"], body["ignore_eos"]) == (16, True, True)
    assert "stream" not in json.loads(first.next(stream=False))


async def test_users_of_several_processes_are_measured_together() -> None:
    now = most = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal now, most
        body = await request.json()
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1
        if body.get("stream"):
            return await streaming(chunk("a dog"), usage(2), b"data: [DONE]\n\n")(request)
        return web.json_response(whole(2))

    def drive(clients: Clients, *, stream: bool) -> Window:
        clients.start(5, stream=stream)
        span = Span(time.perf_counter(), time.perf_counter() + 0.3)
        clients.tell(span)
        outcome = clients.finish(span)
        assert not outcome.failures
        assert outcome.cpu_s > 0
        return outcome.window(span)

    async with serving(handler) as endpoint:
        with Clients(endpoint, [b"jpeg", b"more"], 2, processes=2) as clients:
            whole_answers = await asyncio.to_thread(drive, clients, stream=False)
            streams = await asyncio.to_thread(drive, clients, stream=True)

    assert most == 5
    for window in (whole_answers, streams):
        assert window.ended_inside()
        assert {answer.tokens for answer in window.answers} == {2}
    assert not any(answer.texts for answer in whole_answers.answers)
    assert all(answer.texts for answer in streams.answers)


async def test_lost_requests_are_counted_until_answers_come_again() -> None:
    broken = False

    async def handler(_: web.Request) -> web.StreamResponse:
        return web.Response(status=503, text="lost") if broken else web.json_response(whole(2))

    def drive(clients: Clients) -> Any:
        nonlocal broken
        clients.start(2, stream=False)
        broken = True
        time.sleep(0.2)  # longer than any answer under way
        opened = time.perf_counter()
        clients.tell(Span(opened, float("inf")))
        broken = False
        clients.wait_for_answer(within_s=60)
        span = Span(opened, time.perf_counter())
        clients.tell(span)
        return clients.finish(span)

    async with serving(handler) as endpoint:
        with Clients(endpoint, [b"jpeg"], 2, processes=1) as clients:
            outcome = await asyncio.to_thread(drive, clients)

    assert outcome.failures["status 503: lost"] >= 2
    assert outcome.answers[-1].started > outcome.answers[0].started


async def test_a_client_process_that_ends_is_noticed() -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        for process in clients._processes:
            process.kill()
        return web.json_response(whole(2))

    async with serving(handler) as endpoint:
        with (
            Clients(endpoint, [b"jpeg"], 2, processes=1) as clients,
            pytest.raises(ClientsFailed, match="has ended"),
        ):
            await asyncio.to_thread(clients.start, 1, stream=False)


PAGE = """\
# TYPE ray_blip2_step_duration_seconds histogram
ray_blip2_step_duration_seconds_count{{phase="decode",replica="a"}} {count}
ray_blip2_step_duration_seconds_count{{phase="decode",replica="b"}} {count}
# TYPE ray_blip2_step_duration_seconds_exact_total counter
ray_blip2_step_duration_seconds_exact_total{{phase="decode",replica="a"}} {seconds}
# TYPE ray_blip2_batch_size_exact_total counter
ray_blip2_batch_size_exact_total{{stage="encoder"}} {images}
# TYPE ray_blip2_generated_tokens_total counter
ray_blip2_generated_tokens_total{{}} {tokens}
"""


def test_means_are_of_what_was_counted_since_the_last_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pages = iter(
        [
            PAGE.format(count=10, seconds=7, images=5, tokens=50),
            PAGE.format(count=10, seconds=7, images=8, tokens=50),  # not all is counted yet
            PAGE.format(count=30, seconds=7.1, images=8, tokens=90),
        ]
    )
    monkeypatch.setattr(gpu_server, "METRICS_POLL_S", 0)
    monkeypatch.setattr(gpu_server.Meters, "_page", lambda _: next(pages))

    taken = gpu_server.Meters("http://127.0.0.1:1/v1").take(images=3, tokens=40)

    assert taken["complete"] == {"": 1}
    assert taken["step_ms"]["decode"] == pytest.approx(2.5)


def load(server: str, users: int, *, stream: bool = False, each_s: float = 1.0) -> dict[str, Any]:
    answers = [
        Answer(start, start + each_s, 16, (start + 0.05,) if stream else ())
        for start in np.arange(0, 20, each_s)
    ]
    used = Usage(seconds=10.0, cpu_s={"ServeReplica:blip2:Encoder": 2.0, "raylet": 1.0})
    return row_of(server, users, stream, Window(5, 15, answers), used)


def test_a_row_has_rates_latencies_and_cpu_time() -> None:
    row = load("app", 8, stream=True)

    assert row["requests_per_s"] == pytest.approx(1)
    assert row["tokens_per_s"] == pytest.approx(16)
    assert row["latency_ms"]["p50"] == pytest.approx(1000)
    assert row["first_text_ms"]["p99"] == pytest.approx(50)
    figures, cpu = lines(row).splitlines()
    assert len(figures) == len(head())
    assert cpu.endswith("Encoder 200.0, raylet 100.0; together 300.0")


def test_the_application_is_held_against_the_bare_processes() -> None:
    rows = [load("app", 256), load("app", 256, stream=True), load("app", 8, stream=True)]
    assert [row["what"] for row in asked(rows)] == ["first text p50 in ms, 8 users"]

    whole_ratio, streamed, first_text = asked([*rows, load("bare", 256, each_s=0.88)])

    assert whole_ratio["is"] == pytest.approx(0.88, abs=0.01)
    assert [whole_ratio["met"], streamed["met"], first_text["met"]] == [False, True, True]


@pytest.mark.long  # two starts of everything
def test_it_measures_the_application_and_the_bare_processes(tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    options = ["--device", "cpu", "--users", "2", "--seconds", "0.5", "--pictures", "8"]
    command = [sys.executable, "-m", "loadtest.bench.gpu_app", *options, "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr

    report = json.loads(output.read_text())
    assert "NOT A GPU" in done.stdout
    assert not report["failed"]
    assert report["equal_answers"] == 8
    loads = [(row["server"], row["stream"]) for row in report["loads"]]
    assert loads == [("app", False), ("app", True), ("bare", False)]
    assert all(row["requests_per_s"] > 0 for row in report["loads"])
    for row in report["loads"][:2]:
        assert row["means"]["complete"] == {"": 1}
        assert row["means"]["step_ms"]["decode"] > 0
