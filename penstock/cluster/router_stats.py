"""The router's counts and gauges, as its metrics show them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.engine.api import EngineStats

if TYPE_CHECKING:
    from penstock.cluster.router import ClusterEngine


def router_stats(router: ClusterEngine) -> EngineStats:
    """On the router's thread."""
    port = router.port.counts
    waiting = sum(1 for routed in router.requests.values() if not routed.answer.parts)
    decoding = sum(1 for routed in router.requests.values() if routed.answer.parts and routed.first_token_s)
    gauges = {
        "requests_waiting": float(waiting),
        "requests_prefill": float(len(router.requests) - waiting - decoding),
        "requests_decoding": float(decoding),
        "engines": float(len(router.port.engines)),
    }
    counters = {name: float(count) for name, count in (*router.counters.items(), *router.brain.counts.items())}
    for name in ("connections", "refused_secret", "refused_protocol", "refused_registration", "fenced_frames"):
        counters[f"cluster_{name}"] = float(getattr(port, name))
    engines = router.port.engines.values()
    labelled = {
        f"engine_{name}": {engine.name: float(getattr(engine.report, name)) for engine in engines}
        for name in ("unfinished", "tokens", "decoding", "read_queue_bytes", "free_pages", "buffer_free_blocks")
    }
    return EngineStats(gauges, counters, labelled, {"mode": "router", "policy": router.settings.brain.read})
