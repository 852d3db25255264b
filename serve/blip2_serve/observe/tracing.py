"""Sends the spans of Serve's tracing to an OpenTelemetry collector over HTTP.

Serve makes a span for each stage of a request, and one for choosing each replica.
"""

from __future__ import annotations

import os

from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from blip2_serve.client import is_loopback

OTLP_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"  # OpenTelemetry's own variable
OTLP = f"{__name__}:otlp"  # for Serve's TracingConfig


def otlp() -> list[SpanProcessor]:
    """Exports to the collector at OTEL_EXPORTER_OTLP_ENDPOINT. Needs the extra `trace`."""
    import requests
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    session = requests.Session()
    # The environment's proxy is for other machines.
    session.trust_env = not is_loopback(os.environ.get(OTLP_ENDPOINT, ""))
    return [BatchSpanProcessor(OTLPSpanExporter(session=session))]
