"""Network settings for a cluster: InfiniBand virtual lanes, RoCE priorities, or host queues for plain TCP.

DualPath, section on traffic: decode hand-off, tokens and collectives on high-priority lanes (about 99 % by weighted
round robin), bulk KV on a low-priority one. The output is text for an administrator; nothing is applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from penstock.core.cluster.bounds import NodeLinks, link_use, ratio_bounds
from penstock.core.config import ConfigError, check_range
from penstock.pool.net.lanes import BULK_DSCP, BULK_PRIORITY, URGENT_DSCP, URGENT_PRIORITY

Kind = Literal["infiniband", "roce", "tcp"]
KINDS: tuple[Kind, ...] = ("infiniband", "roce", "tcp")

URGENT_SL, BULK_SL = 0, 2  # service level = virtual lane
URGENT_PRIO, BULK_PRIO = 3, 1  # of RoCE
LOSSLESS_PRIOS = (0, 1, 2, 3)
GBIT = 1e9 / 8

# DualPath: lane 2 (bulk KV) is not in the high-priority table; in the low one it has a third of a lane's weight.
OPENSM = """\
qos TRUE
qos_max_vls 4
qos_high_limit 240
qos_vlarb_high 0:192,1:192,2:0,3:192
qos_vlarb_low 0:192,1:192,2:64,3:192
qos_sl2vl 0,1,2,3,0,1,2,3,0,1,2,3,0,1,2,3"""


class FabricHost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One machine: its network devices (`mlx5_0`; for RoCE and TCP their interfaces, `ens1f0np0`)."""

    name: str
    storage: list[str] = []
    compute: list[str] = []


class Fabric(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[fabric]` of cluster.toml. The rates are per NIC; `memory_gb_s` is a machine's memory bandwidth."""

    kind: str = "infiniband"
    storage_gbit_s: float = 400.0
    compute_gbit_s: float = 400.0
    gpus: int = 8
    memory_gb_s: float = 500.0
    prefill_nodes: int | None = None
    decode_nodes: int | None = None
    host: list[FabricHost] = []


@dataclass(frozen=True, slots=True)
class Section:
    """Settings for one place: a heading that names the place, and lines."""

    where: str
    lines: tuple[str, ...]


def read_fabric(raw: Mapping[str, Any]) -> Fabric:
    """Raises ConfigError."""
    try:
        fabric = msgspec.convert(dict(raw), Fabric)
    except msgspec.ValidationError as error:
        raise ConfigError(f"[fabric]: {error}") from None
    if fabric.kind not in KINDS:
        raise ConfigError(f"[fabric]: kind is {fabric.kind!r}; allowed: {', '.join(KINDS)}")
    for name in ("storage_gbit_s", "compute_gbit_s", "memory_gb_s", "gpus"):
        check_range(f"[fabric]: {name}", getattr(fabric, name), 1e-3, 1e6)
    return fabric


def sections(fabric: Fabric, prefill_nodes: int, decode_nodes: int) -> list[Section]:
    """All settings, by place. Host counts are those of the cluster, unless `[fabric]` sets others."""
    found = [_bounds(fabric, fabric.prefill_nodes or prefill_nodes, fabric.decode_nodes or decode_nodes)]
    if fabric.kind == "infiniband":
        found += _infiniband(fabric)
    elif fabric.kind == "roce":
        found += _roce(fabric)
    else:
        found += _tcp(fabric)
    return found


def _bounds(fabric: Fabric, prefill_nodes: int, decode_nodes: int) -> Section:
    links = NodeLinks(fabric.gpus, fabric.compute_gbit_s * GBIT, fabric.storage_gbit_s * GBIT, fabric.memory_gb_s * 1e9)
    low, high = ratio_bounds(links)
    lines = [f"only storage NICs limit where prefill nodes / decode nodes is from {low:.3g} to {high:.3g}"]
    if low > high:
        lines = ["the storage NIC is too fast for the rest of a node: no ratio leaves it the only limit"]
    if prefill_nodes and decode_nodes:
        name, used = link_use(links, prefill_nodes, decode_nodes).worst
        word = "within its limit" if used <= 1 else "BEYOND its limit"
        lines.append(
            f"this cluster: {prefill_nodes} / {decode_nodes}; with all storage NICs busy "
            f"{name.replace('_', ' ')} is used to {used:.0%}: {word}"
        )
    return Section("prefill and decode nodes", tuple(lines))


def _infiniband(fabric: Fabric) -> list[Section]:
    policy = (
        "qos-levels",
        "    qos-level    # hand-off to decode engines, tokens, collectives",
        "        name: DEFAULT",
        f"        sl: {URGENT_SL}",
        "    end-qos-level",
        "    qos-level    # KV between pool, prefill and decode engines",
        "        name: bulk",
        f"        sl: {BULK_SL}",
        "    end-qos-level",
        "end-qos-levels",
    )
    found = [
        Section("subnet manager, /etc/opensm/opensm.conf (then restart opensm)", tuple(OPENSM.splitlines())),
        Section("subnet manager, /etc/opensm/qos-policy.conf", policy),
    ]
    for host in fabric.host:
        lines = [f"smpquery -C {device} vlarb -D 0    # shows the tables above on port 1" for device in host.compute]
        devices = ",".join(f"{device}:1" for device in host.compute)
        lines += [
            f"UCX_NET_DEVICES={devices} UCX_IB_SL={URGENT_SL}    # processes of the urgent lane",
            f"UCX_NET_DEVICES={devices} UCX_IB_SL={BULK_SL}    # the bulk lane (NIXL)",
        ]
        found.append(Section(f"host {host.name}", tuple(lines)))
    return found


def _roce(fabric: Fabric) -> list[Section]:
    pfc = ",".join("1" if prio in LOSSLESS_PRIOS else "0" for prio in range(8))
    switch = (
        "trust DSCP on every port",
        f"DSCP {URGENT_DSCP} -> traffic class {URGENT_PRIO}: 98 % of the bandwidth by weighted round robin",
        f"DSCP {BULK_DSCP} -> traffic class {BULK_PRIO}: 1 %, work-conserving (it takes what the others leave)",
        f"traffic classes {', '.join(map(str, LOSSLESS_PRIOS))} lossless: PFC on, ECN marking on; the others lossy",
    )
    found = [Section("switches", switch)]
    for host in fabric.host:
        lines = []
        for device in (*host.compute, *host.storage):
            lines += [
                f"mlnx_qos -i {device} --trust dscp --pfc {pfc}",
                f"mlnx_qos -i {device} --dscp2prio set,{URGENT_DSCP},{URGENT_PRIO}",
                f"mlnx_qos -i {device} --dscp2prio set,{BULK_DSCP},{BULK_PRIO}",
                f"mlnx_qos -i {device} --tsa ets,ets,strict,ets,strict,strict,strict,strict --tcbw 1,1,0,98,0,0,0,0",
            ]
        lines.append(f"UCX_IB_TRAFFIC_CLASS={URGENT_DSCP << 2}    # processes of the urgent lane")
        lines.append(f"UCX_IB_TRAFFIC_CLASS={BULK_DSCP << 2}    # the bulk lane (NIXL)")
        found.append(Section(f"host {host.name}", tuple(lines)))
    return found


def _tcp(fabric: Fabric) -> list[Section]:
    """Penstock marks its sockets (DSCP and SO_PRIORITY) itself; hosts and switches must be set up to use the marks."""
    switch = (
        f"DSCP {URGENT_DSCP}: strict priority (expedited forwarding)",
        f"DSCP {BULK_DSCP}: below best effort (class selector 1)",
    )
    found = [Section("switches", switch)]
    for host in fabric.host:
        lines = [
            f"tc qdisc replace dev {device} root handle 1: prio bands 3"
            f"    # SO_PRIORITY {URGENT_PRIORITY} goes before {BULK_PRIORITY}"
            for device in (*host.compute, *host.storage)
        ]
        found.append(Section(f"host {host.name}", tuple(lines)))
    return found
