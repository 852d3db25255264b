"""`blip2-serve up` behind a proxy: it gets ready, answers, traces, and stops when told to."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from blip2_serve.demo import scenes
from support.collector import Collector, orphans, stages_of
from support.images import data_url, image_message
from support.listeners import SERVICES, TOKEN_FILE, ask_ray, ports, send_pickles
from support.server import wait_until
from support.stopping import stop_with_a_stream_under_way
from support.up import Up, listening, running_up

SCENE = scenes.sample(5_001)
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
STAGES = {"Preprocessor pixels", "Encoder encode", "Generator generate"}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    with collector.running():
        yield collector


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Up]:
    """A server on all addresses that traces requests on demand and logs in JSON."""
    folder = tmp_path_factory.mktemp("up")
    flags = ("--host", "0.0.0.0", "--trace", "0", "--log-format", "json")
    with running_up(folder, *flags, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url) as server:
        yield server


def test_it_captions_the_shipped_picture_and_shows_how_to_ask(server: Up) -> None:
    printed = server.log.read_text()
    assert f"is ready: open {server.url} in a browser" in printed
    assert re.search(r"generator +1 ", printed)  # of the table of stages
    assert "a large red square at the top left" in printed
    assert f"{server.url}/v1/caption" in printed
    assert '"message": "loaded vision model' in printed


def test_each_stage_has_a_span_under_the_clients_trace(server: Up, collector: Collector) -> None:
    asked = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "traced"}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        body = {"image": data_url(SCENE.image)}
        response = client.post("/v1/caption", json=body, headers=asked)
        assert response.json()["data"][0]["caption"] == SCENE.caption
        assert response.headers["x-request-id"] == "traced"
        # Not traced: the server has --trace 0, and this request does not ask for it.
        chat = {"messages": [image_message(scenes.sample(78).image)]}
        assert client.post("/v1/chat/completions", json=chat).is_success

    # Each process sends its spans at intervals of its own.
    wait_until(lambda: stages_of(collector.of(TRACE)) >= STAGES, 60)
    wait_until(lambda: not orphans(collector.of(TRACE), PARENT), 60)
    spans = collector.of(TRACE)
    assert len(spans) == len(collector.spans)
    for stage in STAGES:
        (span,) = (s for s in spans if s.name == f"replica_handle_request {stage}")
        attributes = {a.key: a.value.string_value for a in span.attributes}
        assert attributes["request_id"] == "traced"
        assert span.end_time_unix_nano > span.start_time_unix_nano


def test_requests_on_this_machine_bypass_the_proxy(server: Up) -> None:
    assert httpx.post(
        f"{server.url}/v1/caption", files={"image": b""}, timeout=60
    ).status_code in range(400, 500)
    assert server.proxied == []


def test_it_listens_on_all_addresses_when_told_to(server: Up) -> None:
    assert listening(server.family()) == {"haproxy": {int(server.url.rpartition(":")[2])}}


def test_no_port_takes_a_pickle_or_a_call_of_rays_without_the_token(
    server: Up, tmp_path: Path
) -> None:
    """SGLang CVE-2026-3059, -3060, -7301. With the token both get through: the probes work."""
    token = TOKEN_FILE.read_text().strip()
    others, through = set[str](), set[str]()
    for port, name in ports(server.family()).items():
        for sent, found in ((None, others), ("wrong", others), (token, through)):
            mark = tmp_path / f"{port} {sent}"
            send_pickles(port, mark, sent)
            if mark.exists():
                found.add(f"{name} has unpickled it")
            found |= {f"{service}: {code}" for service, code in ask_ray(port, sent).items()}

    assert others == {f"{service}: UNAUTHENTICATED" for service in SERVICES}
    assert through == {f"{service}: OK" for service in SERVICES} | {
        f"ray::ServeReplica:blip2:{stage} has unpickled it"
        for stage in ("Ingress", "Preprocessor", "Encoder", "Generator")
    }


def test_sigterm_finishes_a_stream_and_leaves_no_process(server: Up) -> None:
    stop_with_a_stream_under_way(server, signal.SIGTERM, group=False)
