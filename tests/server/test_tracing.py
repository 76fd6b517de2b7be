"""Spans of requests, as OpenTelemetry's SDK hands them to an exporter."""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from penstock.core.config import ConfigError
from penstock.server import tracing
from penstock.server.tracing import Tracing, check_tracing
from tests.asking import wait_until
from tests.server.echo_engine import EchoEngine
from tests.server.served import Served, Start

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def traced(start: Start, exporter: Any, engine: EchoEngine | None = None) -> Served:
    served = start(engine)
    served.app.tracing = Tracing(exporter, "tiny", served.app.metrics.traces_dropped.inc)
    return served


def spans_of(exporter: InMemorySpanExporter) -> tuple[Any, list[Any]]:
    """The request's span and its stages, in order."""
    wait_until(lambda: bool(exporter.get_finished_spans()), "spans are exported")
    spans = exporter.get_finished_spans()
    roots = [span for span in spans if span.kind is SpanKind.SERVER]
    assert len(roots) == 1
    below = [span for span in spans if span is not roots[0]]
    assert all(span.parent.span_id == roots[0].context.span_id for span in below)
    stages = [span for span in below if "penstock.stage" in span.attributes]
    return roots[0], sorted(stages, key=lambda span: span.start_time)


def test_a_request_is_a_span_with_its_stages_below(start: Start) -> None:
    exporter = InMemorySpanExporter()
    served = traced(start, exporter)
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-session-id": "s1"}
    answer = served.http.post("/v1/completions", json={"prompt": [70, 71], "max_tokens": 3}, headers=headers).json()
    root, below = spans_of(exporter)
    assert root.name == "text_completion tiny" and root.status.status_code is not StatusCode.ERROR
    assert (f"{root.context.trace_id:032x}", f"{root.parent.span_id:016x}") == (TRACE, PARENT)
    said = dict(root.attributes)
    assert said["gen_ai.operation.name"] == "text_completion" and said["gen_ai.request.model"] == "tiny"
    assert said["gen_ai.response.id"] == answer["id"] and said["gen_ai.conversation.id"] == "s1"
    assert (said["gen_ai.usage.input_tokens"], said["gen_ai.usage.output_tokens"]) == (2, 3)
    assert said["gen_ai.response.finish_reasons"] == ("length",) and said["gen_ai.request.max_tokens"] == 3
    assert said["gen_ai.response.time_to_first_chunk"] > 0
    assert below[0].name == "prepare"
    assert {"compute", "decode"} <= {span.name for span in below}
    assert all(before.end_time == after.start_time for before, after in pairwise(below)), "no gap, no overlap"
    assert root.start_time == below[0].start_time and below[-1].end_time <= root.end_time


def test_each_link_that_blocks_were_read_over_is_a_span(start: Start) -> None:
    exporter = InMemorySpanExporter()
    served = traced(start, exporter)
    assert served.http.post("/v1/completions", json={"prompt": [70, 71], "max_tokens": 3}).status_code == 200
    root, stages = spans_of(exporter)
    reads = {span.attributes.get("penstock.link"): span for span in exporter.get_finished_spans()}
    assert set(reads) == {None, "ssd:0", "net"} and reads["net"].name == "read net"
    assert reads["ssd:0"].attributes["penstock.loaded_bytes"] == 600
    submitted = stages[0].end_time
    assert all(submitted == reads[name].start_time < reads[name].end_time <= root.end_time for name in ("ssd:0", "net"))
    assert reads["net"].end_time > reads["ssd:0"].end_time


def test_a_chat_starts_a_trace_of_its_own(start: Start) -> None:
    exporter = InMemorySpanExporter()
    served = traced(start, exporter)
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "n": 2}
    assert served.http.post("/v1/chat/completions", json=body).status_code == 200
    root, below = spans_of(exporter)
    assert root.name == "chat tiny" and root.parent is None and root.attributes["gen_ai.request.choice.count"] == 2
    assert {span.attributes["penstock.choice"] for span in below} == {0, 1}


def test_what_is_not_sampled_is_left_out_and_a_failure_is_an_error(start: Start) -> None:
    exporter = InMemorySpanExporter()
    served = traced(start, exporter, EchoEngine(fail_after=1))
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    served.http.post("/v1/completions", json={"prompt": [70], "max_tokens": 3}, headers=headers)
    served.http.post("/v1/completions", json={"prompt": [70], "max_tokens": 3}, headers={"traceparent": "nonsense"})
    root, _ = spans_of(exporter)
    assert root.status.status_code is StatusCode.ERROR and root.attributes["error.type"] == "500"
    assert root.parent is None


class Stuck(SpanExporter):  # type: ignore[misc]
    """A collector that does not answer until it is released, and then refuses."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def export(self, spans: Any) -> SpanExportResult:
        assert self.released.wait(20.0)
        return SpanExportResult.FAILURE


def test_a_collector_that_does_not_answer_costs_its_spans_alone(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "REQUESTS_WAITING_MAX", 2)
    exporter = Stuck()
    served = traced(start, exporter)
    for _ in range(6):
        assert served.http.post("/v1/completions", json={"prompt": [70], "max_tokens": 1}).status_code == 200

    def dropped() -> float:
        return served.app.metrics.registry.get_sample_value("penstock_traces_dropped_total") or 0.0

    assert dropped() >= 3
    exporter.released.set()
    wait_until(lambda: dropped() == 6, "every request is counted")


def test_addresses_are_checked() -> None:
    for wrong in ("127.0.0.1:4318", "ftp://h/", "http://"):
        with pytest.raises(ConfigError, match="otlp_endpoint is"):
            check_tracing(wrong)
