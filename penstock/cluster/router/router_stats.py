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
    gauges = request_gauges(requests) | engine_gauges(port)
    counted = {name: float(count) for name, count in (*counters.items(), *scheduler.counts.items())}
    counted |= port_counters(port) | {"preemptions": float(port.counts.preemptions)}
    engines = port.engines.values()
    labelled = {
        f"engine_{name}": {engine.name: float(getattr(engine.report, name)) for engine in engines}
        for name in ("unfinished", "tokens", "decoding", "read_queue_bytes", "free_pages", "buffer_free_blocks")
    }
    blocks = {engine.card.block_tokens for engine in engines}  # one size: others are refused
    extra = {"mode": "router", "policy": scheduler.config.read, "block_tokens": next(iter(blocks), 0)}
    return EngineStats(gauges, counted, labelled, extra)


def request_gauges(requests: Mapping[str, RoutedRequest]) -> dict[str, float]:
    """Open requests by stage."""
    waiting = sum(1 for routed in requests.values() if not routed.answer.parts)
    decoding = sum(1 for routed in requests.values() if routed.answer.parts and routed.first_token_s)
    return {
        "requests_waiting": float(waiting),
        "requests_prefill": float(len(requests) - waiting - decoding),
        "requests_decoding": float(decoding),
    }


def engine_gauges(port: EngineRegistry) -> dict[str, float]:
    """Of the engines that are registered."""
    return {
        "engines": float(len(port.engines)),
        "l1_pages_total": float(sum(engine.report.total_pages for engine in port.engines.values())),
        "l1_pages_available": float(sum(engine.report.free_pages for engine in port.engines.values())),
    }


def port_counters(port: EngineRegistry) -> dict[str, float]:
    """What a port counts of connections and frames."""
    names = (
        "connections", "refused_secret", "refused_tls", "refused_protocol", "refused_registration", "fenced_frames",
        "strangers_dropped", "listener_failures",
    )  # fmt: skip
    return {f"cluster_{name}": float(getattr(port.counts, name)) for name in names}
