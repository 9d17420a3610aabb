"""One story is one trace over the front, the generator and the decoder."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider

from deployments.observability.tracing import ENDPOINTS, OTLP, send_by_otlp, tracing_config
from minigpt5.errors import SettingsError
from tests.helpers.processes import MODEL, Server, running_server

CLIENTS_TRACE = 0xC1
DEPLOYMENTS = {"Ingress", "Ledger", "VokenGenerator", "DiffusionDecoder"}


def test_no_request_is_traced_unless_it_is_asked_for() -> None:
    assert tracing_config(0) is None
    with pytest.raises(SettingsError, match="traces is 2 but must be from 0"):
        tracing_config(2)


@pytest.mark.parametrize("name", ENDPOINTS)
def test_spans_go_to_files_or_to_the_endpoint_that_is_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for one in ENDPOINTS:
        monkeypatch.delenv(one, raising=False)
    files = tracing_config(0.25)
    assert files and files.enabled and (files.sampling_ratio, files.exporter_import_path) == (0.25, "")
    monkeypatch.setenv(name, "http://127.0.0.1:4318")
    sent = tracing_config(1)
    assert sent and sent.exporter_import_path == OTLP


def test_spans_reach_an_otlp_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[tuple[str, ExportTraceServiceRequest]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    monkeypatch.setenv(ENDPOINTS[0], f"http://127.0.0.1:{collector.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    provider = TracerProvider()
    for processor in send_by_otlp():
        provider.add_span_processor(processor)
    try:
        with provider.get_tracer("test").start_as_current_span("story"):
            pass
        assert provider.force_flush()
    finally:
        provider.shutdown()
        collector.shutdown()
        collector.server_close()
    [(path, request)] = received
    assert path == "/v1/traces"
    assert [span.name for span in request.resource_spans[0].scope_spans[0].spans] == ["story"]


def read_spans(logs: Path) -> Iterator[dict[str, Any]]:
    """Spans of Serve's exporter: JSON objects one after another, in a file for each replica."""
    decoder = json.JSONDecoder()
    for path in (logs / "spans").glob("replica_*.json"):
        text = path.read_text().lstrip()
        while text:
            span, end = decoder.raw_decode(text)
            yield {**span, "deployment": path.name.split("_")[2]}
            text = text[end:].lstrip()


@pytest.fixture
def traced(tmp_path: Path) -> Iterator[Server]:
    with running_server(tmp_path, "--traces", "1") as found:
        yield found


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason=f"no model is shipped in {MODEL}")
def test_each_story_is_one_trace_over_front_generator_and_decoder(traced: Server) -> None:
    body = {"prompt": "A fox", "pages": 2, "seed": 5, "steps": 4}
    of_client = {"traceparent": f"00-{CLIENTS_TRACE:032x}-{1:016x}-01"}
    waited = traced.client.post("/v1/stories", json=body, headers=of_client).json()["id"]
    # A story that goes on after its client has its answer belongs to the same trace as the request.
    waits_not = traced.client.post("/v1/stories", json={**body, "prompt": "A bear", "wait": False}).json()["id"]
    assert traced.client.get(f"/v1/stories/{waits_not}", params={"wait": 60}).json()["status"] == "done"
    spans = list(read_spans(traced.logs))
    traces: dict[str, list[dict[str, Any]]] = {}
    for span in spans:
        traces.setdefault(span["context"]["trace_id"], []).append(span)
    by_story: dict[str, list[dict[str, Any]]] = {}
    for trace in traces.values():
        named = {span["attributes"]["story_id"] for span in trace if span["name"] == "story"}
        assert len(named) <= 1
        for story_id in named:
            assert story_id not in by_story
            by_story[story_id] = trace
    assert set(by_story) == {waited, waits_not}
    assert f"0x{CLIENTS_TRACE:032x}" not in traces  # no client decides what is traced
    for story_id, trace in by_story.items():
        assert {span["deployment"] for span in trace} == DEPLOYMENTS
        by_id = {span["context"]["span_id"]: span for span in trace}
        assert sum(span["parent_id"] not in by_id for span in trace) == 1  # one root: the request
        [story] = [span for span in trace if span["name"] == "story"]
        calls = [span for span in trace if span["attributes"].get("call_method") in ("generate", "decode")]
        received = [span for span in calls if span["deployment"] != "Ingress"]
        assert sorted(span["attributes"]["call_method"] for span in received) == ["decode", "decode", "generate"]
        for span in received:
            assert span["attributes"]["story_id"] == story_id
            assert by_id[by_id[span["parent_id"]]["parent_id"]] is story  # by the span of the router
        pages = {span["attributes"]["page"] for span in received if span["deployment"] == "DiffusionDecoder"}
        assert pages == {1, 2}
