"""Traces by Serve's own means: one story is one trace over front, generator and decoder.

Serve begins a span for each request and each call of a deployment, and passes its context on. What is added here: a
story's own span, which outlives the request, ids on Serve's spans, and where spans go. With tracing off, as it is
unless it is asked for, OpenTelemetry's calls do nothing.
"""

from __future__ import annotations

import os

from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from ray.serve.schema import TracingConfig

from deployments.observability.story_context import current_request, current_story
from minigpt5.errors import SettingsError

TRACER = trace.get_tracer("minigpt5")
OTLP = "deployments.observability.tracing:send_by_otlp"
ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def tracing_config(ratio: float) -> TracingConfig | None:
    """Trace this share of the requests; 0: none. Spans go where ENDPOINTS say, else to files in `spans/` of Serve's
    log folder. Raises SettingsError where `ratio` is no share."""
    if not 0 <= ratio <= 1:
        raise SettingsError(f"traces is {ratio:g} but must be from 0 (no request) to 1 (every request)")
    if not ratio:
        return None
    exporter = OTLP if any(os.environ.get(name) for name in ENDPOINTS) else ""  # "": Serve's own, which writes files
    return TracingConfig(enabled=True, sampling_ratio=ratio, exporter_import_path=exporter)


def send_by_otlp() -> list[SpanProcessor]:
    """For Serve's `exporter_import_path`: send spans by HTTP as the variables OTEL_EXPORTER_OTLP_* say."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # not where tracing is off

    return [BatchSpanProcessor(OTLPSpanExporter())]


def name_span(**attributes: str | int | float) -> None:
    """Add the ids, and `attributes`, to the span that Serve has begun for this call."""
    span = trace.get_current_span()
    if span.is_recording():
        span.set_attributes({"story_id": current_story(), "request_id": current_request(), **attributes})
