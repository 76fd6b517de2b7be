"""The router's counters and gauges, for its metrics."""

from __future__ import annotations

from collections.abc import Mapping

from penstock.cluster.router.engine_registry import EngineRegistry
from penstock.cluster.router.routed_request import RoutedRequest
from penstock.core.cluster.inter_engine import InterEngineScheduler
from penstock.engine.api import EngineStats


def router_stats(
    requests: Mapping[str, RoutedRequest],
    port: EngineRegistry,
    scheduler: InterEngineScheduler,
    counters: Mapping[str, int],
) -> EngineStats:
    """Collect them; on the router's thread."""
    waiting = sum(1 for routed in requests.values() if not routed.answer.parts)
    decoding = sum(1 for routed in requests.values() if routed.answer.parts and routed.first_token_s)
    gauges = {
        "requests_waiting": float(waiting),
        "requests_prefill": float(len(requests) - waiting - decoding),
        "requests_decoding": float(decoding),
        "engines": float(len(port.engines)),
        "l1_pages_total": float(sum(engine.report.total_pages for engine in port.engines.values())),
        "l1_pages_available": float(sum(engine.report.free_pages for engine in port.engines.values())),
    }
    counted = {name: float(count) for name, count in (*counters.items(), *scheduler.counts.items())}
    for name in (
        "connections", "refused_secret", "refused_tls", "refused_protocol", "refused_registration", "fenced_frames",
        "strangers_dropped", "listener_failures",
    ):  # fmt: skip
        counted[f"cluster_{name}"] = float(getattr(port.counts, name))
    counted["preemptions"] = float(port.counts.preemptions)
    engines = port.engines.values()
    labelled = {
        f"engine_{name}": {engine.name: float(getattr(engine.report, name)) for engine in engines}
        for name in ("unfinished", "tokens", "decoding", "read_queue_bytes", "free_pages", "buffer_free_blocks")
    }
    blocks = {engine.card.block_tokens for engine in engines}  # one size: others are refused
    extra = {"mode": "router", "policy": scheduler.config.read, "block_tokens": next(iter(blocks), 0)}
    return EngineStats(gauges, counted, labelled, extra)
