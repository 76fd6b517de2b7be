"""The configuration of a pool as one frozen record, made from a TOML file (`pool.setup.config_file`) or from flags."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from penstock.core.config import ConfigError
from penstock.core.new_block import tenant_tag
from penstock.core.settings import setting
from penstock.pool.net.one_sided_agent import RDMA_TRANSPORTS, RdmaTransport
from penstock.pool.net.tls_flags import PeerSettings, named_file
from penstock.units import parse_bytes, parse_rate

Kind = Literal["memory", "uring", "nvme", "spdk", "node"]
KINDS: tuple[str, ...] = get_args(Kind)
WriteAdmission = Literal["all", "reused"]
DEPTH = 32
DEPTH_MAX = 256
BLOCK_BYTES = 2 << 20
MEMBERS_MAX = 256
REPLICATE_MAX = 0.5
CONNECTIONS_ALLOWED = 1 << 16
PROCESSES_PER = ("numa", "drives")
PROCESSES_MAX = 64
_PREFIXES = {"memory": "memory", "uring": "ssd", "nvme": "ssd", "spdk": "ssd", "node": "node"}


@dataclass(frozen=True, slots=True)
class MemberConfig:
    """One member. `capacity_bytes` None: the whole device. `weight` None: from its bandwidth. `pace_bytes_per_s`
    emulates a slower device. `part`: of the member of this name, where several processes divide it. Fields that a kind
    does not have keep their defaults."""

    kind: Kind
    name: str
    capacity_bytes: int | None = None
    weight: float | None = None
    numa_node: int | None = None
    path: Path | None = None
    pcie: str | None = None
    target: str | None = None
    namespace: int = 1
    cpu: int | None = None
    library: Path | None = None
    address: str | None = None
    pace_bytes_per_s: float | None = None
    depth: int = DEPTH
    part: float = 1.0

    @property
    def where(self) -> str | None:
        """The path or address of the member's device, unique among members; None for memory."""
        if self.kind == "spdk":
            return f"{self.pcie or self.target} namespace {self.namespace}"
        return str(self.path) if self.path else self.address

    def same_place(self, other: MemberConfig) -> bool:
        """Whether both are the same member, apart from name and weight."""
        return replace(self, name="", weight=None) == replace(other, name="", weight=None)


@dataclass(frozen=True, slots=True)
class Quota:
    """The limit of one tenant: bytes, or a share of the pool's capacity."""

    limit_bytes: int | None = None
    share: float | None = None

    def bytes_of(self, capacity_bytes: int) -> int:
        """The limit in bytes for a pool of this capacity."""
        return self.limit_bytes if self.limit_bytes is not None else int((self.share or 0.0) * capacity_bytes)


def parse_processes(given: str | int) -> int | str:
    """A number of processes, or what there is one for. Raises ValueError."""
    if given in PROCESSES_PER:
        return given
    if not str(given).isdecimal() or not 1 <= int(given) <= PROCESSES_MAX:
        raise ValueError(f"processes is {given!r}; allowed: 1 to {PROCESSES_MAX}, {', '.join(PROCESSES_PER)}")
    return int(given)


@dataclass(frozen=True, kw_only=True)
class NodeSettings(PeerSettings):
    """Settings of a pool node, by flag or by key; a change needs a restart. `state`: folder of the tables of SSD
    members. `staging_bytes`: limit of staging memory (None: as much as blocks need). `connections`: clients'
    connections served at the same time, `connections_per_address`: of one address (None: the node's defaults). Clients
    of this node, and nodes that are its members, must have the secret and certificates of `secret_file` and
    `peer_tls_*` (`pool.net.tls`). `rdma`: clients read blocks one-sided (`pool.net.pool_lending`), over `rdma_devices`
    (none named: over all)."""

    name: str = setting("pool", "What this node calls itself.")
    listen: str = setting("127.0.0.1:7070", "HOST:PORT to serve on; port 0 picks a free one.")
    processes: int | str = setting(
        1,
        "How many processes serve the members, each on a port of its own from --listen on; `numa`: one per NUMA node, "
        "`drives`: one per SSD.",
        parse=parse_processes,
    )
    state: Path | None = setting(
        None, "Folder for the tables of slabs; beside each slab when not given.", parse=named_file, shown=""
    )
    pace_bytes_per_s: float | None = setting(
        None,
        "Send blocks no faster than this, such as 200MB/s: a NIC of that speed.",
        name="pace",
        parse=parse_rate,
        shown="",
    )
    staging_bytes: int | None = setting(
        None,
        "SIZE of the memory that blocks pass through on their way to and from SSDs and other nodes. No larger block is "
        "taken.",
        name="staging",
        parse=parse_bytes,
        shown="128MiB, and more once a larger block comes",
    )
    connections: int | None = setting(
        None, "How many connections of clients are served at once; an engine has 3 or more.", least=1, shown="4096"
    )
    connections_per_address: int | None = setting(
        None,
        "How many of these may come from one address: a host, or all that are behind one NAT.",
        least=1,
        shown="half of --connections",
    )
    rdma: bool = setting(
        False,
        "Let clients read and write blocks one-sided, by RDMA (needs penstock[nixl] or penstock[verbs]).",
    )
    rdma_transport: RdmaTransport = setting(
        "nixl",
        "How bytes move then: by nixl or by verbs. With nixl, clients can overwrite all memory of this node's pool: "
        "for clients that are trusted with it. With verbs they can only read it.",
    )
    rdma_device: tuple[str, ...] = setting((), "An RDMA device to use, such as mlx5_0; may be repeated.", shown="all")
    replicate: float = setting(
        0.0,
        "Share of this node's space, from 0 to 0.5, that copies of other nodes' hot blocks may take: engines then read "
        "these from the less loaded of two nodes, and lose none of them with one.",
        shown="0",
    )
    metrics_listen: str | None = setting(
        None, "HOST:PORT to serve /metrics and /health on; port 0 picks a free one.", shown="none"
    )
    metrics_key_file: Path | None = setting(
        None, "File with the key that /metrics asks for.", "FILE", parse=named_file, shown=""
    )
    secret_file: Path | None = setting(
        None,
        "File with the cluster's secret: clients and member nodes must have it.",
        "FILE",
        parse=named_file,
        shown="",
    )


@dataclass(frozen=True, slots=True)
class PoolConfig(NodeSettings):
    """A pool. `file` is where it was read from. `profile`: the file that `penstock profile` wrote. `default_quota`: of
    each tenant that `quotas` (by `cache_salt`) does not name; with `named_tenants_only` such tenants store nothing."""

    members: tuple[MemberConfig, ...]
    write_admission: WriteAdmission = "all"
    profile: Path | None = None
    block_bytes: int = BLOCK_BYTES
    default_quota: Quota | None = None
    quotas: tuple[tuple[str, Quota], ...] = ()
    named_tenants_only: bool = False
    file: Path | None = None

    def _check_rdma(self) -> None:
        if self.rdma_transport not in RDMA_TRANSPORTS:
            raise ConfigError(f"rdma_transport is {self.rdma_transport!r}; allowed: {', '.join(RDMA_TRANSPORTS)}")
        if self.rdma and self.pace_bytes_per_s:
            raise ConfigError("rdma and pace are both given; allowed: one of them, one-sided reads have no pace")
        if self.rdma_transport != "nixl" and not self.rdma:
            raise ConfigError("rdma_transport is given without rdma; allowed: both, or none")
        if self.rdma_device and not self.rdma:
            raise ConfigError("rdma_device is given without rdma; allowed: both, or none")

    def __post_init__(self) -> None:
        if not self.members:
            raise ConfigError("the pool has no member; allowed: at least one size of memory, slab or [[member]]")
        if len(self.members) > MEMBERS_MAX:
            raise ConfigError(f"the pool has {len(self.members)} members; allowed: at most {MEMBERS_MAX}")
        self._check_rdma()
        if not 0 <= self.replicate <= REPLICATE_MAX:
            raise ConfigError(f"replicate is {self.replicate}; allowed: from 0 (no copies) to {REPLICATE_MAX}")
        for what in ("connections", "connections_per_address"):
            if (given := getattr(self, what)) is not None and not 1 <= given <= CONNECTIONS_ALLOWED:
                raise ConfigError(f"{what} is {given}; allowed: from 1 to {CONNECTIONS_ALLOWED}")
        for what in ("name", "where"):
            seen: set[str] = set()
            for member in self.members:
                value = getattr(member, what)
                if value is not None and value in seen:
                    raise ConfigError(f"two members have the {_same(member, what)} {value}; allowed: each only once")
                seen.add(value)

    def quota_bytes(self, capacity_bytes: int) -> tuple[int | None, dict[bytes, int]]:
        """Limits in bytes: the default (None: no limit), and those of named tenants by their tag."""
        named = {tenant_tag(tenant): quota.bytes_of(capacity_bytes) for tenant, quota in self.quotas}
        return (self.default_quota.bytes_of(capacity_bytes) if self.default_quota else None), named

    def table_of(self, member: MemberConfig) -> Path | None:
        """Path of the table of an SSD member; None: beside its slab."""
        if self.state is None:
            return None
        where = str(member.path.absolute()) if member.path else str(member.where)
        return self.state / (re.sub(r"[^A-Za-z0-9._-]+", "-", where).strip("-") + ".db")


def _same(member: MemberConfig, what: str) -> str:
    return "name" if what == "name" else "address" if member.kind == "node" else "device"


def config_of_flags(
    memory: Sequence[int],
    slabs: Sequence[tuple[Path, int]],
    weights: Sequence[float] | None = None,
    depth: int = DEPTH,
    nodes: Sequence[str] = (),
    **other: Any,
) -> PoolConfig:
    """The configuration of the short flags: memory members, then slabs; `weights` in this order. `nodes`: addresses of
    pool nodes; `other`: further fields of PoolConfig. Raises ConfigError."""
    count = len(memory) + len(slabs)
    if weights is not None and len(weights) != count:
        raise ConfigError(f"{count} members and {len(weights)} weights; allowed: none, or as many as members")
    sizes: list[tuple[Kind, Path | None, int]] = [("memory", None, size) for size in memory]
    sizes += [("uring", path, size) for path, size in slabs]
    names = default_names([kind for kind, _, _ in sizes], set())
    members = tuple(
        MemberConfig(
            kind, name, capacity_bytes=size, path=path, weight=weights[i] if weights is not None else None, depth=depth
        )
        for i, (name, (kind, path, size)) in enumerate(zip(names, sizes, strict=True))
    )
    members += tuple(
        MemberConfig("node", name, address=address)
        for name, address in zip(default_names(["node"] * len(nodes), set()), nodes, strict=True)
    )
    return PoolConfig(members, **other)


def default_names(kinds: Sequence[str], taken: set[str]) -> list[str]:
    """`memory:0`, `ssd:0`, `node:0`, ...: with the first free numbers."""
    names, used = [], set(taken)
    for kind in kinds:
        number = 0
        while (name := f"{_PREFIXES[kind]}:{number}") in used:
            number += 1
        used.add(name)
        names.append(name)
    return names
