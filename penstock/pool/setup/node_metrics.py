"""A pool node's Prometheus metrics, from what its members say at each scrape."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from penstock.pool.api import PoolStat
from penstock.pool.net.node import PoolNode
from penstock.pool.node_backend import NodeBackend

STAT_TIMEOUT_S = 2.0
_GAUGES = ("capacity_bytes", "used_bytes", "blocks", "healthy", "weight", "read_bytes_per_s", "queued_loads")
_MEMBER_GAUGES = (*_GAUGES, "queued_stores")
_MEMBER_COUNTERS = ("read_bytes", "written_bytes", "errors")
_COUNTERS = ("writes_dropped", "writes_not_admitted", "writes_refused", "checksum_errors", "moved_blocks", "evictions")


def node_metrics(node: PoolNode, pool: NodeBackend) -> bytes:
    """The exposition text of the node's own members; members of other nodes have metrics of their own. Raises PoolError
    when the pool cannot be asked in time."""
    registry = CollectorRegistry()
    registry.register(_Families(node, node.with_ways((pool.own or pool).stat(STAT_TIMEOUT_S))))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, node: PoolNode, stat: PoolStat) -> None:
        self._node, self._stat = node, stat

    def collect(self) -> Iterator[Metric]:
        stat = self._stat
        yield GaugeMetricFamily("penstock_node_connections", "Open connections", float(self._node.connections))
        usable = float(bool(self._node.one_sided))
        yield GaugeMetricFamily("penstock_node_one_sided", "1: clients may read and write blocks one-sided", usable)
        lending = self._node.pool_lending
        leased_bytes = float(lending.leased_bytes) if lending is not None else 0.0
        yield GaugeMetricFamily("penstock_node_leased_bytes", "Bytes lent to clients now", leased_bytes)
        for name in (*_MEMBER_GAUGES, *_MEMBER_COUNTERS):
            kind = GaugeMetricFamily if name in _MEMBER_GAUGES else CounterMetricFamily
            family = kind(f"penstock_pool_member_{name}", f"Member: {name}", labels=["member", "kind"])
            for member in stat.members:
                family.add_metric([member.name, member.kind], float(getattr(member, name)))
            yield family
        state = GaugeMetricFamily("penstock_pool_member_state", "1 for the member's state", labels=["member", "state"])
        for member in stat.members:
            state.add_metric([member.name, member.state], 1.0)
        yield state
        for name in _COUNTERS:
            yield CounterMetricFamily(f"penstock_pool_{name}", f"Pool: {name}", float(getattr(stat, name)))
        for name, label, kind, counts in (
            ("penstock_pool_tenant_bytes", "tenant", GaugeMetricFamily, stat.tenants),
            ("penstock_pool_copy_bytes", "tenant", GaugeMetricFamily, stat.copies),
            ("penstock_pool_over_quota_bytes", "tenant", GaugeMetricFamily, stat.over_quota),
            ("penstock_pool_evictions_by_reason", "reason", CounterMetricFamily, stat.evictions_by),
            ("penstock_pool_sent_bytes", "way", CounterMetricFamily, stat.sent_bytes_by),
            ("penstock_pool_received_bytes", "way", CounterMetricFamily, stat.received_bytes_by),
            ("penstock_pool_losses", "kind", CounterMetricFamily, stat.losses),
            ("penstock_thread_failures", "thread", CounterMetricFamily, stat.thread_failures),
        ):
            counted = kind(name, f"By {label}", labels=[label])
            for value, count in counts:
                counted.add_metric([value], float(count))
            yield counted
