"""A cluster of prefill and decode nodes as in DualPath, and the systems compared on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from penstock.core.cluster.bounds import NodeLinks
from penstock.core.cluster.decisions import InterEngineConfig, Placement
from penstock.core.cluster.paths import ReadPolicy
from penstock.core.cluster.waiting_queue import Order
from penstock.core.config import ConfigError, check_range
from penstock.sim.served_model import Gpu


@dataclass(frozen=True, slots=True)
class ClusterShape:
    """Nodes and their links (defaults: the paper's set-up). Engines form groups of `*_group_nodes` nodes.

    `buffer_bytes` is a decode engine's host memory for arriving prompts.
    """

    prefill_nodes: int
    decode_nodes: int
    prefill_group_nodes: int = 1
    decode_group_nodes: int = 1
    gpus: int = 8
    storage_nic_bytes_per_s: float = 50.0e9
    compute_nic_bytes_per_s: float = 50.0e9
    memory_bytes_per_s: float = 500.0e9
    buffer_bytes: float = 64.0e9
    gpu: Gpu = field(default_factory=Gpu)

    def __post_init__(self) -> None:
        for name in ("prefill_nodes", "decode_nodes", "prefill_group_nodes", "decode_group_nodes", "gpus"):
            check_range(name, getattr(self, name), 1, 1e5)
        for name in ("storage_nic_bytes_per_s", "compute_nic_bytes_per_s", "memory_bytes_per_s", "buffer_bytes"):
            check_range(name, getattr(self, name), 1, 1e15)
        for nodes, group in (("prefill_nodes", "prefill_group_nodes"), ("decode_nodes", "decode_group_nodes")):
            if getattr(self, nodes) % getattr(self, group):
                raise ConfigError(f"{nodes} is {getattr(self, nodes)}; allowed: a multiple of {group}")

    @property
    def name(self) -> str:
        """For example "2P1D"."""
        return f"{self.prefill_nodes}P{self.decode_nodes}D"

    @property
    def links(self) -> NodeLinks:
        """Rates of one node's links."""
        return NodeLinks(
            self.gpus, self.compute_nic_bytes_per_s, self.storage_nic_bytes_per_s, self.memory_bytes_per_s
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class System:
    """A compared system: the policies of the scheduler core, and whether engines load and hand off layer by layer."""

    name: str
    placement: Placement
    read: ReadPolicy
    layerwise: bool = True
    quota_by: str = "attention"
    order: Order = "fcfs"
    replan: bool = True
    weigh: bool = False  # by read queues and predicted compute, beyond the paper
    recompute: bool = False
    level: bool = False  # ranks of a prefill step take equal shares of attention, beyond the paper

    def scheduler(self, **settings: Any) -> InterEngineConfig:
        """The policies, with other settings of the inter-engine scheduler."""
        return InterEngineConfig(
            placement=self.placement,
            read=self.read,
            order=self.order,
            replan=self.replan,
            weigh_reads=self.weigh,
            weigh_compute=self.weigh,
            **settings,
        )


BASIC = System("basic", "turns", "prefill", layerwise=False, quota_by="tokens")
LAYERWISE = System("layerwise", "turns", "prefill", quota_by="tokens")
DUAL = System("dual path", "turns", "alternate", quota_by="tokens")
PAPER = System("scheduler", "balanced", "shorter")
SPLIT = System("split", "balanced", "split", weigh=True)
LEVEL = System("level", "balanced", "split", weigh=True, level=True)
RECOMPUTE = System("recompute", "balanced", "split", weigh=True, recompute=True, level=True)
ORACLE = System("oracle", "balanced", "none", weigh=True, level=True)
SHORT_FIRST = System("short first", "balanced", "split", weigh=True, order="sjf", level=True)
"""Split reads, level steps, and shortest compute first instead of first come first served."""
ABLATION = (BASIC, LAYERWISE, DUAL, PAPER, SPLIT, LEVEL, SHORT_FIRST)
SYSTEMS = {system.name: system for system in (*ABLATION, RECOMPUTE, ORACLE)}
