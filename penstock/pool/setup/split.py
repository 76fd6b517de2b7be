"""The configuration of a pool node as those of several processes that share its members.

SPLIT-1  Statement: Every SSD belongs to one process as a whole, and to the same one for as long as the node runs.
         Memory is divided, that of a NUMA node among the processes of this NUMA node.
SPLIT-2  Statement: What the processes have together is what the file says: memory, quotas in bytes, staging, pace. What
         each client needs of each of them, connections, each process has in full.
Verification: tests/pool/setup/test_split.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from penstock.core.config import ConfigError
from penstock.core.layout import STAGING_ALIGNMENT_BYTES
from penstock.io.numa import node_cpus, numa_nodes
from penstock.pool.setup.config import PROCESSES_MAX, MemberConfig, PoolConfig, Quota
from penstock.units import format_address, parse_address

SYSTEM = Path("/sys")


@dataclass(frozen=True, slots=True)
class ProcessConfig:
    """What one process serves. `siblings`: the ports of the others. `cpus`: the processors that it may use; empty:
    all."""

    config: PoolConfig
    siblings: tuple[int, ...]
    cpus: frozenset[int]


def process_count(config: PoolConfig, system: Path = SYSTEM) -> int:
    """How many processes serve the node. Raises ConfigError for a configuration that several cannot serve."""
    count = config.processes
    if count == "numa":
        count = len(_nodes_with_cpus(system))
    elif count == "drives":
        count = min(PROCESSES_MAX, max(1, sum(_is_drive(member) for member in config.members)))
    assert isinstance(count, int)
    other = next((member for member in config.members if member.kind == "node"), None)
    if count > 1 and other is not None:
        raise ConfigError(
            f"processes is {config.processes} and {other.name} is another pool node; allowed: one of them "
            "(name both nodes to the engines)"
        )
    return count


class Splitter:
    """Divides a node's configurations, the first one and those that are read later, in the same way."""

    def __init__(self, count: int, ports: Sequence[int], system: Path = SYSTEM) -> None:
        """`ports`: where the processes listen."""
        self._count, self._ports, self._system = count, tuple(ports), system
        self._nodes = _nodes_with_cpus(system)
        self._nodes_of = [_nodes_of_process(number, count, self._nodes) for number in range(count)]
        self._places: dict[str, int] = {}  # process by path or address of a drive

    def split(self, config: PoolConfig) -> list[ProcessConfig]:
        """The configuration of each process. Raises ConfigError."""
        members: list[list[MemberConfig]] = [[] for _ in range(self._count)]
        places = self._placed([member for member in config.members if _is_drive(member)])
        for member in config.members:
            if _is_drive(member):
                members[places[str(member.where)]].append(member)
            else:
                for number, part in self._divided(member):
                    members[number].append(part)
        idle = next((number for number, some in enumerate(members) if not some), None)
        if idle is not None:
            raise ConfigError(
                f"processes is {config.processes} and process {idle} has no member; allowed: as many as there are "
                "SSDs, or a memory member, which is divided"
            )
        self._places |= places
        return [self._one(config, number, tuple(some)) for number, some in enumerate(members)]

    def _placed(self, drives: Sequence[MemberConfig]) -> dict[str, int]:
        """The process of each drive: the one that has it, else of those on its NUMA node the one with the fewest."""
        places = {where: at for member in drives if (at := self._places.get(where := str(member.where))) is not None}
        load = [list(places.values()).count(number) for number in range(self._count)]
        for member in drives:
            where = str(member.where)
            if where in places:
                continue
            near = drive_node(member, self._system) if len(self._nodes) > 1 else None
            able = [number for number in range(self._count) if near in self._nodes_of[number]]
            places[where] = min(able or range(self._count), key=lambda number: load[number])
            load[places[where]] += 1
        return places

    def _divided(self, member: MemberConfig) -> list[tuple[int, MemberConfig]]:
        """The parts of a memory member, with the processes that have them. Raises ConfigError."""
        asked, size = member.numa_node, member.capacity_bytes or 0
        holders = [number for number in range(self._count) if asked is None or asked in self._nodes_of[number]]
        if not holders:
            raise ConfigError(
                f"{member.name}: numa_node is {asked}; allowed: {', '.join(str(node) for node in self._nodes)}"
            )
        if (part_bytes := size // len(holders) // STAGING_ALIGNMENT_BYTES * STAGING_ALIGNMENT_BYTES) == 0:
            raise ConfigError(f"{member.name} has {size} bytes for {len(holders)} processes; allowed: more memory")
        part = 1 / len(holders)
        weight = member.weight * part if member.weight is not None else None
        pace = member.pace_bytes_per_s * part if member.pace_bytes_per_s is not None else None
        found = replace(member, capacity_bytes=part_bytes, weight=weight, part=part, pace_bytes_per_s=pace)
        return [(number, replace(found, numa_node=self._memory_node(asked, number))) for number in holders]

    def _memory_node(self, asked: int | None, number: int) -> int | None:
        own = self._nodes_of[number]
        if asked is not None or len(self._nodes) == 1 or len(own) > 1:
            return asked
        return own[0]

    def _one(self, config: PoolConfig, number: int, members: tuple[MemberConfig, ...]) -> ProcessConfig:
        port, pace, staging = self._ports[number], config.pace_bytes_per_s, config.staging_bytes
        align, share = STAGING_ALIGNMENT_BYTES, _capacity_share(config, members, self._count)
        found = replace(
            config,
            members=members,
            name=f"{config.name}-{number}",
            listen=format_address(parse_address(config.listen)[0], port),
            metrics_listen=_counted_up(config.metrics_listen, number),
            pace_bytes_per_s=pace / self._count if pace is not None else None,
            staging_bytes=max(align, staging // self._count // align * align) if staging is not None else None,
            default_quota=_part_of(config.default_quota, share) if config.default_quota is not None else None,
            quotas=tuple((tenant, _part_of(quota, share)) for tenant, quota in config.quotas),
        )
        siblings = tuple(other for other in self._ports if other != port)
        return ProcessConfig(found, siblings, frozenset(self._cpus(number)))

    def _cpus(self, number: int) -> set[int]:
        if len(self._nodes) == 1:
            return set()
        folder = self._system / "devices/system/node"
        return set[int]().union(*(node_cpus(node, folder) for node in self._nodes_of[number]))


def _nodes_with_cpus(system: Path) -> list[int]:
    folder = system / "devices/system/node"
    nodes = numa_nodes(folder)
    return [node for node in nodes if node_cpus(node, folder)] or nodes[:1]


def _nodes_of_process(number: int, count: int, nodes: Sequence[int]) -> list[int]:
    """The NUMA nodes of a process: one, or several where there are fewer processes."""
    if count >= len(nodes):
        return [nodes[number * len(nodes) // count]]
    return [node for at, node in enumerate(nodes) if at * count // len(nodes) == number]


def _is_drive(member: MemberConfig) -> bool:
    return member.kind not in ("memory", "node")


def drive_node(member: MemberConfig, system: Path = SYSTEM) -> int | None:
    """The NUMA node that a drive is attached to; None where the system does not say it."""
    if member.pcie is not None:
        place = system / "bus/pci/devices" / member.pcie
    elif member.kind == "nvme" and member.path is not None:
        place = system / "class/nvme-generic" / member.path.name / "device"
    elif member.path is not None:
        existing = member.path if member.path.exists() else member.path.parent
        try:
            found = os.stat(existing)
        except OSError:
            return None
        number = found.st_rdev if existing.is_block_device() else found.st_dev
        place = system / "dev/block" / f"{os.major(number)}:{os.minor(number)}"
    else:
        return None
    place = place.resolve()
    for folder in (place, *place.parents):
        try:
            node = int((folder / "numa_node").read_text())
        except (OSError, ValueError):
            continue
        return node if node >= 0 else None
    return None


def _capacity_share(config: PoolConfig, members: Sequence[MemberConfig], count: int) -> float:
    """The part of the node's capacity that some members have; where it is not known yet, an equal part."""
    sizes = [member.capacity_bytes for member in config.members]
    if None in sizes:
        return 1 / count
    return sum(member.capacity_bytes or 0 for member in members) / sum(size or 0 for size in sizes)


def _part_of(quota: Quota, share: float) -> Quota:
    """A quota in bytes is divided; a share of the pool is the same share of each process."""
    return quota if quota.limit_bytes is None else Quota(limit_bytes=math.ceil(quota.limit_bytes * share))


def _counted_up(address: str | None, number: int) -> str | None:
    """An address with its port counted up; port 0 stays."""
    if address is None:
        return None
    host, port = parse_address(address)
    if port and port + number > 65535:
        raise ConfigError(f"metrics_listen is {address}; allowed: a port with as many above it as there are processes")
    return format_address(host, port + number if port else 0)
