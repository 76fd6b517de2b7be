"""The server's metrics once more under vLLM's names, which dashboards, endpoint pickers and load generators read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from penstock.engine.api import EngineStats

ENGINE = "0"  # vLLM's label for one engine of several in a process
# vLLM's reasons, and the counters of the engine or the router that they are the sum of.
_REASONS = {
    "stop": ("finished_stop", "ended_stop"),
    "length": ("finished_length", "ended_length"),
    "abort": ("finished_cancelled", "ended_cancelled"),
    "error": ("finished_error", "ended_error", "finished_timeout", "ended_timeout"),
}


def vllm_gauges(stats: EngineStats, model_name: str) -> Iterator[Metric]:
    """What the engine (or the router, of all its engines) says of itself, one snapshot."""
    gauges, counters = stats.gauges, stats.counters
    labels = {"model_name": model_name, "engine": ENGINE}
    running = gauges.get("requests_prefill", 0.0) + gauges.get("requests_decoding", 0.0)
    yield _gauge("num_requests_running", "Requests past admission", labels, running)
    yield _gauge("num_requests_waiting", "Requests before admission", labels, gauges.get("requests_waiting", 0.0))
    pages = gauges.get("l1_pages_total", 0.0)
    if pages:
        used = 1.0 - gauges.get("l1_pages_available", 0.0) / pages
        yield _gauge("kv_cache_usage_perc", "Share of L1's pages in use, 0 to 1", labels, used)
        shape = {"block_size": str(stats.extra.get("block_tokens", "")), "num_gpu_blocks": str(int(pages))}
        yield _gauge("cache_config_info", "Shape of L1", {"engine": ENGINE, **shape}, 1.0)
    preemptions = float(counters.get("preemptions", 0.0))
    yield _counter("num_preemptions", "Requests that started over for want of a page", labels, preemptions)
    ended = CounterMetricFamily("vllm:request_success", "Ended requests by reason", labels=[*labels, "finished_reason"])
    for reason, names in _REASONS.items():
        ended.add_metric([*labels.values(), reason], sum(float(counters.get(name, 0.0)) for name in names))
    yield ended


def vllm_counters(counters: Mapping[str, Counter], model_name: str) -> Iterator[Metric]:
    """Counters of the server by their name at vLLM."""
    for name, counter in counters.items():
        labels = {"model_name": model_name, "engine": ENGINE}
        family = next(iter(counter.collect()))
        value = next((sample.value for sample in family.samples if sample.name.endswith("_total")), 0.0)
        yield _counter(name, family.documentation, labels, value)


def vllm_histograms(histograms: Mapping[str, Histogram], model_name: str) -> Iterator[Metric]:
    """Histograms of the server by their name at vLLM, with the server's own buckets."""
    for name, histogram in histograms.items():
        for family in histogram.collect():
            alias = Metric(f"vllm:{name}", family.documentation, "histogram")
            for sample in family.samples:
                labels = {"model_name": model_name, "engine": ENGINE, **sample.labels}
                alias.add_sample(alias.name + sample.name.removeprefix(family.name), labels, sample.value)
            yield alias


def _gauge(name: str, text: str, labels: Mapping[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(f"vllm:{name}", text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _counter(name: str, text: str, labels: Mapping[str, str], value: float) -> Metric:
    family = CounterMetricFamily(f"vllm:{name}", text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family
