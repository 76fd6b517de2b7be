"""Prometheus metrics of the server: what its clients observe, and the engine's statistics, read at each scrape."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from penstock.engine.api import EngineAPI, EngineStats, RequestReport
from penstock.pool.losses import losses
from penstock.pool.net import ways
from penstock.process.guarded_thread import thread_failures
from penstock.server.vllm_metrics import vllm_counters, vllm_gauges, vllm_histograms

log = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 150.0, 600.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_RATIOS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 1.0, 2.0, 5.0)
_NOT_A_NAME = re.compile(r"[^a-zA-Z0-9_]")
# Labelled series of the engine that are counters.
_COUNTED = ("request_seconds", "load_failures", "save_failures", "hand_off_failures", "pool_evictions")
MEASURABLE_S = 1e-3  # shorter predictions are not compared with measurements


class ServerMetrics:
    """Counters and histograms of one server; `render` returns the text of `/metrics`."""

    def __init__(self, engine: EngineAPI, model_name: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()  # all but the engine's statistics
        self._engine, self._model_name = engine, model_name
        to = self.registry
        self.http_requests = Counter(
            "penstock_http_requests", "HTTP requests answered", ["path", "status"], registry=to
        )
        self.open_requests = Gauge("penstock_http_open_requests", "HTTP requests being answered", registry=to)
        self.finished = Counter("penstock_requests", "Generation requests by outcome", ["outcome"], registry=to)
        self.ttft = Histogram("penstock_ttft_seconds", "Arrival to first token", buckets=_SECONDS, registry=to)
        self.tpot = Histogram(
            "penstock_tpot_seconds", "Mean time per token after the first", buckets=_TOKEN_SECONDS, registry=to
        )
        self.e2e = Histogram(
            "penstock_request_seconds", "Arrival to the end of the answer", buckets=_SECONDS, registry=to
        )
        self.stage_seconds = Counter(
            "penstock_request_stage_seconds", "Time of requests by stage or reason for waiting", ["stage"], registry=to
        )
        self.prediction_error = Histogram(
            "penstock_prediction_error_ratio",
            "Absolute error of the predicted time, relative to the measured time",
            ["part"],
            buckets=_RATIOS,
            registry=to,
        )
        self.prompt_tokens = Counter("penstock_prompt_tokens", "Prompt tokens of finished requests", registry=to)
        self.cached_tokens = Counter("penstock_cached_tokens", "Prompt tokens whose KV was reused", registry=to)
        self.generated_tokens = Counter("penstock_generated_tokens", "Generated tokens", registry=to)
        self.recomputed_tokens = Counter(
            "penstock_recomputed_tokens", "Tokens computed after a failed load", registry=to
        )
        self.loaded_bytes = Counter("penstock_loaded_bytes", "KV bytes fetched from the pool", registry=to)
        self.slo = Counter(
            "penstock_slo", "Requests with a TTFT deadline, by whether it was met", ["result"], registry=to
        )
        for result in ("met", "missed"):
            self.slo.labels(result)
        self.registry.register(_VllmNames(self, model_name))
        self.registry.register(ProcessMetrics())
        self.traces_dropped = Counter("penstock_traces_dropped", "Requests whose spans were not sent", registry=to)

    def observe(self, report: RequestReport) -> None:
        """Count one finished engine request."""
        self.prompt_tokens.inc(report.prompt_tokens)
        self.cached_tokens.inc(report.cached_tokens)
        self.generated_tokens.inc(report.generated_tokens)
        self.recomputed_tokens.inc(report.recomputed_tokens)
        self.loaded_bytes.inc(report.loaded_bytes)
        for label, start_s, end_s in report.spans:
            self.stage_seconds.labels(label).inc(max(end_s - start_s, 0.0))
        if report.slo_ttft_s is not None:
            self.slo.labels("met" if met_slo(report) else "missed").inc()
        pairs = (
            ("load", report.predicted_load_s, report.measured_load_s),
            ("compute", report.predicted_compute_s, report.measured_compute_s),
        )
        for part, predicted_s, measured_s in pairs:
            if measured_s >= MEASURABLE_S:
                self.prediction_error.labels(part).observe(abs(predicted_s - measured_s) / measured_s)

    def render(self) -> bytes:
        """The exposition text. Queries the engine, so do not call it on the event loop's thread."""
        stats: EngineStats | None = None
        try:
            stats = self._engine.stats()
        except TimeoutError as error:
            log.warning("the engine's metrics are not available: %s", error)
        return self.render_all(self.registry.collect(), stats)

    def render_all(self, families: Iterable[Metric], stats: EngineStats | None) -> bytes:
        """The exposition text of these families and of the engine's statistics (None: there are none at present)."""
        healthy, _ = self._engine.healthy()
        return generate_latest(_Families([*families, *engine_families(healthy, stats, self._model_name)]))


def met_slo(report: RequestReport) -> bool:
    """Whether the first token arrived before its deadline (True without a deadline)."""
    if report.slo_ttft_s is None:
        return True
    return report.ttft_s is not None and report.ttft_s <= report.slo_ttft_s


class _Families(Collector):
    """Families of metrics that have been collected, as the exposition takes them."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        """See CollectorRegistry."""
        return self._families


def engine_families(healthy: bool, stats: EngineStats | None, model_name: str) -> Iterator[Metric]:
    """The engine's statistics as metrics `penstock_engine_*`, and what vLLM has too under its names."""
    yield GaugeMetricFamily("penstock_engine_healthy", "1 while the engine makes progress", float(healthy))
    if stats is None:
        return
    for name, value in stats.gauges.items():
        yield GaugeMetricFamily(_name(name), f"Engine: {name}", float(value))
    for name, value in stats.counters.items():
        yield CounterMetricFamily(_name(name), f"Engine: {name}", float(value))
    for name, series in stats.labelled.items():
        kind = CounterMetricFamily if name in _COUNTED else GaugeMetricFamily
        family = kind(_name(name), f"Engine: {name}", labels=["name"])
        for label, value in series.items():
            family.add_metric([label], float(value))
        yield family
    yield from vllm_gauges(stats, model_name)


class _VllmNames(Collector):
    """Counters and histograms of the server under vLLM's names. A prompt's tokens count as queries of the prefix
    cache, those whose KV was not computed as its hits, from whatever tier."""

    def __init__(self, metrics: ServerMetrics, model_name: str) -> None:
        self._counters = {
            "prompt_tokens": metrics.prompt_tokens,
            "prompt_tokens_cached": metrics.cached_tokens,
            "generation_tokens": metrics.generated_tokens,
            "prefix_cache_queries": metrics.prompt_tokens,
            "prefix_cache_hits": metrics.cached_tokens,
        }
        self._histograms = {
            "time_to_first_token_seconds": metrics.ttft,
            "request_time_per_output_token_seconds": metrics.tpot,
            "e2e_request_latency_seconds": metrics.e2e,
        }
        self._model_name = model_name

    def describe(self) -> list[Metric]:
        return []  # called at registration; of these there may be none at that time

    def collect(self) -> Iterator[Metric]:
        yield from vllm_counters(self._counters, self._model_name)
        yield from vllm_histograms(self._histograms, self._model_name)


class ProcessMetrics(Collector):
    """Failures in this process that belong to no single request."""

    def describe(self) -> list[Metric]:
        """Nothing: which there are is known at a scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Families of counters and gauges."""
        threads = CounterMetricFamily(
            "penstock_thread_failures", "Exceptions that a thread survived or ended with", labels=["thread"]
        )
        lost = CounterMetricFamily(
            "penstock_pool_losses", "Loads, saves and other requests to the pool that failed", labels=["kind"]
        )
        read = CounterMetricFamily(
            "penstock_pool_read_bytes",
            "Bytes read from pool nodes: in messages, one-sided, or into device memory",
            labels=["way"],
        )
        written = CounterMetricFamily(
            "penstock_pool_written_bytes", "Bytes written to pool nodes, in messages or one-sided", labels=["way"]
        )
        one_sided = GaugeMetricFamily(
            "penstock_pool_one_sided", "1 where blocks travel one-sided from and to a pool node", labels=["node"]
        )
        usable = {place: int(not state.startswith("off")) for place, state in ways.states().items()}
        moved = ((read, ways.read_bytes()), (written, ways.written_bytes()))
        families = ((threads, thread_failures()), (lost, losses()), *moved, (one_sided, usable))
        for family, counts in families:
            for label, count in counts.items():
                family.add_metric([label], float(count))
            yield family


def _name(name: str) -> str:
    return f"penstock_engine_{_NOT_A_NAME.sub('_', name)}"
