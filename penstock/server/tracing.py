"""OpenTelemetry: one span for each answered request, and below it the stages that its time went into.

Names are those of OpenTelemetry's GenAI conventions; stages are the gap-free split of `RequestReport.spans`. Beside
them, each link over which blocks were read from the pool has a span (`RequestReport.link_reads`); these overlap.

A request with a `traceparent` continues that trace, and is left out where that says that it is not sampled. Spans are
made and sent on a thread of their own: at most REQUESTS_WAITING_MAX requests wait for it, others are dropped and
counted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from penstock.core.config import ConfigError
from penstock.extras import require_extra
from penstock.process.guarded_thread import GuardedWorker
from penstock.process.rate_limited_log import RateLimitedLog
from penstock.server.generation import Choice, Generation

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

REQUESTS_WAITING_MAX = 1024
EXPORT_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 3.0
_CONTEXT_HEADERS = ("traceparent", "tracestate")
_NS = 1e9


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """What a span says of a request beside its answers. `context`: headers of the trace that it is part of."""

    operation: str  # "chat" or "text_completion"
    answer_id: str
    context: Mapping[str, str]

    @classmethod
    def of(cls, headers: Mapping[str, str], answer_id: str, *, chat: bool) -> TracedRequest:
        """With what `headers` say of its trace."""
        context = {name: headers[name] for name in _CONTEXT_HEADERS if name in headers}
        return cls("chat" if chat else "text_completion", answer_id, context)


def check_tracing(endpoint: str) -> None:
    """Raises ConfigError where spans cannot be sent there."""
    if urlsplit(endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).hostname:
        raise ConfigError(f"otlp_endpoint is {endpoint!r}; allowed: a URL such as http://127.0.0.1:4318/v1/traces")
    require_extra("otel", "otlp_endpoint")


def otlp_tracing(endpoint: str, model_name: str, on_dropped: Callable[[], None]) -> Tracing:
    """Spans to a collector, http://HOST:PORT/v1/traces."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return Tracing(OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S), model_name, on_dropped)


@dataclass(frozen=True, slots=True)
class _Times:
    """Of one request, nanoseconds since 1970."""

    begin_ns: int
    submitted_ns: int  # to the engine, from where on the times of its report count
    end_ns: int


def _stages(choices: Sequence[Choice], times: _Times) -> Iterator[tuple[str, int, int, int]]:
    """Stage, choice, begin and end: reading the request (`prepare`), then the split of each report."""
    yield "prepare", 0, times.begin_ns, times.submitted_ns
    for choice in choices:
        for label, start_s, stop_s in choice.report.spans if choice.report is not None else ():
            start_ns, stop_ns = (times.submitted_ns + int(one * _NS) for one in (start_s, stop_s))
            yield label, choice.index, start_ns, stop_ns


def _link_reads(choices: Sequence[Choice], times: _Times) -> Iterator[tuple[str, int, int, int, int]]:
    """Link, choice, begin, end and bytes of what was read from the pool; links overlap."""
    for choice in choices:
        for link, start_s, stop_s, size_bytes in choice.report.link_reads if choice.report is not None else ():
            start_ns, stop_ns = (times.submitted_ns + int(one * _NS) for one in (start_s, stop_s))
            yield link, choice.index, start_ns, stop_ns, size_bytes


class Tracing:
    """Sends spans to an exporter of OpenTelemetry's SDK. `ended` is for the event loop, the rest for any thread."""

    def __init__(self, exporter: Any, model_name: str, on_dropped: Callable[[], None] = lambda: None) -> None:
        """`on_dropped` is called for each request whose spans are not sent; from any thread."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        ended: list[Any] = []

        class Gather(SpanProcessor):  # type: ignore[misc]
            """All spans of one request go out together."""

            def on_end(self, span: Any) -> None:
                """One is complete; those of traces that are not sampled never come."""
                ended.append(span)

        self._ended_spans = ended
        self._exporter = exporter
        self._model_name = model_name
        self._propagator = TraceContextTextMapPropagator()
        self._provider = TracerProvider(resource=Resource.create({"service.name": "penstock"}), shutdown_on_exit=False)
        self._provider.add_span_processor(Gather())
        self._tracer = self._provider.get_tracer("penstock")
        self._worker = GuardedWorker("penstock-traces", REQUESTS_WAITING_MAX)
        self._on_dropped = on_dropped

    def ended(self, traced: TracedRequest, generation: Generation, outcome: str, arrival_s: float) -> None:
        """A request was answered, or failed, now; `arrival_s` is of the monotonic clock."""
        now_s, now_ns = time.monotonic(), time.time_ns()
        begin_ns = now_ns - int((now_s - arrival_s) * _NS)
        submitted_ns = now_ns - int((now_s - (generation.submitted_s or now_s)) * _NS)
        times = _Times(begin_ns, submitted_ns, now_ns)
        export = partial(self._export, traced, generation.choices, outcome, times)
        if not self._worker.put(export, self._lost):
            self._drop()

    def close(self) -> None:
        """Send what waits, within CLOSE_TIMEOUT_S."""
        self._worker.close(CLOSE_TIMEOUT_S)
        self._exporter.shutdown()

    def _lost(self, error: Exception) -> None:
        self._ended_spans.clear()
        self._drop()

    def _drop(self) -> None:
        self._on_dropped()
        rare.warning("dropped", "spans of a request are not sent: the collector does not take them, or is slow")

    def _export(self, traced: TracedRequest, choices: Sequence[Choice], outcome: str, times: _Times) -> None:
        from opentelemetry.sdk.trace.export import SpanExportResult
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        root = self._tracer.start_span(
            f"{traced.operation} {self._model_name}",
            context=self._propagator.extract(traced.context),
            kind=SpanKind.SERVER,
            attributes=self._attributes(traced, choices),
            start_time=times.begin_ns,
        )
        if outcome != "ok":
            root.set_attribute("error.type", outcome)
            root.set_status(Status(StatusCode.ERROR, outcome))
        below = set_span_in_context(root)
        for label, choice, start_ns, stop_ns in _stages(choices, times):
            attributes = {"penstock.stage": label, "penstock.choice": choice}
            self._tracer.start_span(label, below, attributes=attributes, start_time=start_ns).end(stop_ns)
        for link, choice, start_ns, stop_ns, size_bytes in _link_reads(choices, times):
            attributes = {"penstock.link": link, "penstock.choice": choice, "penstock.loaded_bytes": size_bytes}
            self._tracer.start_span(f"read {link}", below, attributes=attributes, start_time=start_ns).end(stop_ns)
        root.end(times.end_ns)
        spans, self._ended_spans[:] = list(self._ended_spans), []
        if not spans:
            return
        if self._exporter.export(spans) is not SpanExportResult.SUCCESS:
            self._drop()

    def _attributes(self, traced: TracedRequest, choices: Sequence[Choice]) -> dict[str, Any]:
        request = choices[0].request
        reports = [choice.report for choice in choices if choice.report is not None]
        found: dict[str, Any] = {
            "gen_ai.operation.name": traced.operation,
            "gen_ai.provider.name": "penstock",
            "gen_ai.request.model": self._model_name,
            "gen_ai.response.model": self._model_name,
            "gen_ai.response.id": traced.answer_id,
            "gen_ai.request.max_tokens": request.sampling.max_tokens,
            "gen_ai.request.temperature": request.sampling.temperature,
            "gen_ai.request.top_p": request.sampling.top_p,
            "gen_ai.request.choice.count": len(choices),
        }
        if request.session is not None:
            found["gen_ai.conversation.id"] = request.session
        reasons = [choice.finish_reason for choice in choices if choice.finish_reason is not None]
        if reasons:
            found["gen_ai.response.finish_reasons"] = reasons
        if reports:
            found["gen_ai.usage.input_tokens"] = sum(report.prompt_tokens for report in reports)
            found["gen_ai.usage.output_tokens"] = sum(report.generated_tokens for report in reports)
            found["gen_ai.usage.cache_read.input_tokens"] = sum(report.cached_tokens for report in reports)
            found["penstock.loaded_bytes"] = sum(report.loaded_bytes for report in reports)
            first = [report.ttft_s for report in reports if report.ttft_s is not None]
            if first:
                found["gen_ai.response.time_to_first_chunk"] = min(first)
        return found
