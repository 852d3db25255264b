"""Collects OpenTelemetry spans."""

from __future__ import annotations

import contextlib
import gzip
import http.server
from collections.abc import Iterator

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from support.background import serving


class Collector:
    """Receives spans over HTTP, as OpenTelemetry's collector does."""

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
        """Returns the spans of a trace, given its id in hex."""
        return [span for span in self.spans if span.trace_id.hex() == trace]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with serving(self._server):
            yield


def stages_of(spans: list[Span]) -> set[str]:
    """Returns the stages that have spans: the names of Serve's spans without their prefix."""
    prefix = "replica_handle_request "
    return {span.name.removeprefix(prefix) for span in spans if span.name.startswith(prefix)}


def orphans(spans: list[Span], parent: str) -> list[str]:
    """Returns the names of spans whose parent is neither among the spans nor `parent`."""
    known = {parent, *(span.span_id.hex() for span in spans)}
    return [span.name for span in spans if span.parent_span_id.hex() not in known]
