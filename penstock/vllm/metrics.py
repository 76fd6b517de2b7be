"""The connector's statistics in vLLM's metrics: counts, bytes, and each request's time by stage and reason."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from penstock.core.operations import Account

COUNTERS = "counters"  # name -> count of the interval
LABELLED = "labelled"  # name -> label -> count of the interval
GAUGES = "gauges"  # name -> current value

_LABEL_OF = {
    "request_seconds": ("stage", "Time of finished requests by stage or reason for waiting"),
    "load_failures": ("reason", "Blocks that did not arrive and were computed instead"),
    "save_failures": ("reason", "Blocks that could not be saved"),
    "requests_without_pool": ("reason", "Requests whose KV cannot be identified by content, computed without the pool"),
    "pool_read_bytes": ("way", "Bytes read from pool nodes, in messages or one-sided"),
    "pool_written_bytes": ("way", "Bytes written to pool nodes, in messages or one-sided"),
    "link_bytes_per_second": ("link", "Recent bandwidth of each link while it was busy"),
}
COUNTER_HELP = {
    "requests": "Requests that arrived",
    "hit_tokens": "Prompt tokens that the pool held",
    "computed_instead_tokens": "Tokens computed although the pool held them, because computing was faster",
    "fetched_blocks": "Blocks read from the pool",
    "fetched_bytes": "Bytes read from the pool",
    "uploaded_bytes": "Bytes copied into vLLM's cache",
    "saved_blocks": "Blocks written to the pool",
    "saved_bytes": "Bytes written to the pool",
    "saves_dropped": "Blocks not saved, because vLLM needed their pages or too many were queued",
    "fetch_failures": "Fetches that failed",
    "lookup_failures": "Lookups that failed",
    "lookups_late": "Requests that stopped waiting for their lookup",
    "loads_shared": "Blocks that a request got from another request's load",
    "preemptions": "Requests that were preempted and restarted",
    "upload_failures": "Uploads that failed",
    "saves_failed": "Blocks that could not be saved",
    "saves_incomplete": "Blocks not saved, because a sliding window had freed a part of them",
    "hits_of_other_size": "Hits ignored, because the pool's block has another size",
    "hits_withdrawn": "Blocks offered to vLLM and lost before it allocated pages for them",
    "requests_without_loads": "Requests that load nothing, because more wait than max_waiting allows",
    "requests_not_followed": "Requests served without the pool: their id was in use, or Penstock failed for them",
    "loads_refused": "Loads that did not begin and are computed: vLLM allocated other blocks than offered",
    "copies_late": "Copies in a worker that take longer than 30 s",
    "handed_blocks": "Blocks sent to decode hosts",
    "hand_off_failures": "Blocks that could not be sent to a decode host, which loads or computes them itself",
    "rerouted_blocks": "Blocks read by the other side, because the storage NIC of the planned one could not",
    "given_up": "1 after Penstock failed in this engine and vLLM continues without it",
}
_GAUGE_HELP = {
    "l2_slots_total": "Capacity of staging memory in blocks",
    "l2_slots_loads": "Blocks in staging memory for loads",
    "l2_slots_saves": "Blocks in staging memory for saves",
    "loads": "Blocks being loaded",
    "granted_blocks": "Blocks whose place in vLLM's cache is reserved for a load",
    "saves_queued": "Blocks that wait to be saved",
    "predicted_compute_error": "Relative error of predicted step times",
}


class PenstockStats(KVConnectorStats):  # type: ignore[misc]
    """Statistics since they were last taken; plain data, so that they can be sent."""

    data: dict[str, Any]

    def reset(self) -> None:
        """Clear all counts."""
        self.data = {}

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Merge a later interval into this one."""
        merged: dict[str, Any] = {COUNTERS: {}, LABELLED: {}, GAUGES: {}}
        for data in (self.data, other.data):
            _add(merged[COUNTERS], data.get(COUNTERS, {}))
            for name, counts in data.get(LABELLED, {}).items():
                _add(merged[LABELLED].setdefault(name, {}), counts)
            merged[GAUGES].update(data.get(GAUGES, {}))
        self.data = merged
        return self

    def reduce(self) -> dict[str, int | float]:
        """The values for vLLM's log line."""
        counters, labelled = self.data.get(COUNTERS, {}), self.data.get(LABELLED, {})
        line: dict[str, int | float] = {
            "loaded blocks": counters.get("fetched_blocks", 0),
            "loaded MB": round(counters.get("fetched_bytes", 0) / 1e6, 1),
            "saved blocks": counters.get("saved_blocks", 0),
            "saves dropped": counters.get("saves_dropped", 0),
        }
        for reason, count in labelled.get("load_failures", {}).items():
            line[f"failed ({reason})"] = count
        for stage, seconds in sorted(labelled.get("request_seconds", {}).items()):
            line[f"{stage} s"] = round(seconds, 3)
        return line


def _add(into: dict[str, float], more: dict[str, float]) -> None:
    for name, count in more.items():
        into[name] = into.get(name, 0) + count


class StatsTaker:
    """Converts counts since start to counts of an interval."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], float] = {}

    def take(
        self,
        counters: dict[str, float],
        labelled: dict[str, dict[str, float]],
        gauges: dict[str, float],
        ended: Iterable[Account],
        link_bytes_per_s: dict[str, float],
    ) -> PenstockStats | None:
        """Statistics of the interval; None if nothing happened. `counters` and `labelled` are counts since start."""
        seconds: dict[str, float] = {}
        for account in ended:
            for stage, begin_s, end_s in account.spans:
                seconds[stage] = seconds.get(stage, 0.0) + end_s - begin_s
        changed = self._changed("", counters)
        split = {name: found for name, counts in labelled.items() if (found := self._changed(name, counts))}
        if seconds:
            split["request_seconds"] = seconds
        if not changed and not split:
            return None
        values = dict(gauges)
        values.update({f"link_bytes_per_second/{name}": rate for name, rate in link_bytes_per_s.items()})
        return PenstockStats(data={COUNTERS: changed, LABELLED: split, GAUGES: values})

    def _changed(self, kind: str, counts: dict[str, float]) -> dict[str, float]:
        found = {}
        for name, count in counts.items():
            before = self._seen.get((kind, name), 0)
            if count != before:
                found[name] = count - before
                self._seen[kind, name] = count
        return found


class PenstockPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """`vllm:penstock_*` series, one per engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter, gauge = metric_types[Counter], metric_types[Gauge]
        self._counters = {
            name: counter(name=f"vllm:penstock_{name}", documentation=text, labelnames=labelnames)
            for name, text in COUNTER_HELP.items()
        }
        self._gauges = {
            name: gauge(name=f"vllm:penstock_{name}", documentation=text, labelnames=labelnames)
            for name, text in _GAUGE_HELP.items()
        }
        self._labelled = {
            name: (gauge if name.startswith("link") else counter)(
                name=f"vllm:penstock_{name}", documentation=text, labelnames=[*labelnames, label]
            )
            for name, (label, text) in _LABEL_OF.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one engine's counts since the last call."""
        labels = self.per_engine_labelvalues[engine_idx]
        for name, count in transfer_stats_data.get(COUNTERS, {}).items():
            if name in self._counters:
                self._counters[name].labels(*labels).inc(count)
        for name, counts in transfer_stats_data.get(LABELLED, {}).items():
            for label, count in counts.items():
                self._labelled[name].labels(*labels, label).inc(count)
        for name, value in transfer_stats_data.get(GAUGES, {}).items():
            kind, _, link = name.partition("/")
            if link:
                self._labelled[kind].labels(*labels, link).set(value)
            elif kind in self._gauges:
                self._gauges[kind].labels(*labels).set(value)
