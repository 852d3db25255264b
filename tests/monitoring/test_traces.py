"""`up --trace` against a collector: a span for each stage, under the client's own trace."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from blip2_serve.demo import scenes
from support.server import data_url, free_port, image_message, wait_until

BIN = Path(sys.executable).parent
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
STAGES = {"Preprocessor pixels", "Encoder encode", "Generator generate"}


class Collector:
    """Takes spans as OpenTelemetry's collector does."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        spans = self.spans

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                request = ExportTraceServiceRequest.FromString(body)
                for resource in request.resource_spans:
                    for scope in resource.scope_spans:
                        spans.extend(scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def of(self, trace: str) -> list[Span]:
        return [span for span in self.spans if span.trace_id.hex() == trace]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


@contextlib.contextmanager
def up(folder: Path, collector: str) -> Iterator[tuple[str, Path]]:
    """A server that traces who asks for it, with logs in JSON; its URL and what it prints."""
    port = free_port()
    log = folder / "log"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with log.open("w") as output:
        server = subprocess.Popen(
            [
                BIN / "blip2-serve",
                "up",
                "--port",
                str(port),
                "--trace",
                "0",
                "--log-format",
                "json",
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment | {"OTEL_EXPORTER_OTLP_ENDPOINT": collector},
            start_new_session=True,
        )
    try:
        wait_until(lambda: "Ctrl-C" in log.read_text() or server.poll() is not None)
        assert server.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}", log
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


def names(spans: list[Span]) -> set[str]:
    """Of spans of stages, without what Serve puts in front."""
    start = "replica_handle_request "
    return {span.name.removeprefix(start) for span in spans if span.name.startswith(start)}


def orphans(spans: list[Span]) -> list[str]:
    """Spans whose parent is neither there nor the client's."""
    known = {PARENT, *(span.span_id.hex() for span in spans)}
    return [span.name for span in spans if span.parent_span_id.hex() not in known]


def test_each_stage_has_a_span_under_the_clients_trace(tmp_path: Path) -> None:
    collector = Collector()
    with collector.running(), up(tmp_path, collector.url) as (url, log):
        image = scenes.sample(77).image
        asked = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "traced"}
        response = httpx.post(
            f"{url}/v1/caption", json={"image": data_url(image)}, headers=asked, timeout=60
        )
        assert response.status_code == httpx.codes.OK
        assert response.headers["x-request-id"] == "traced"
        # Not sampled: --trace 0, and nobody asked.
        body = {"messages": [image_message(scenes.sample(78).image)]}
        assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).is_success

        # Each process sends its spans in its own time.
        wait_until(lambda: names(collector.of(TRACE)) >= STAGES, 60)
        wait_until(lambda: not orphans(collector.of(TRACE)), 60)
        spans = collector.of(TRACE)
        assert len(spans) == len(collector.spans)
        for stage in STAGES:
            (span,) = (s for s in spans if s.name == f"replica_handle_request {stage}")
            attributes = {a.key: a.value.string_value for a in span.attributes}
            assert attributes["request_id"] == "traced"
            assert span.end_time_unix_nano > span.start_time_unix_nano
    assert '"message": "loaded vision model' in log.read_text()
