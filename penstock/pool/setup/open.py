"""Opens a pool from its configuration: its members, their weights, and the pool itself."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.core.config import ConfigError
from penstock.core.layout import STAGING_ALIGNMENT_BYTES
from penstock.core.pool.policy import PoolPolicy
from penstock.io.api import BlockEngine
from penstock.io.paced import PacedEngine
from penstock.pool.api import PoolError
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.members.device import DeviceMember, open_device_member, open_slab_member, patiently
from penstock.pool.members.memory import MemoryMember
from penstock.pool.members.pairing import device_of
from penstock.pool.node_backend import NodeBackend
from penstock.pool.setup.config import DEPTH, MemberConfig, PoolConfig, config_of_flags
from penstock.pool.setup.profile import PoolProfile, read_profile
from penstock.pool.union.children import SHARES_BELOW
from penstock.units import format_bytes

if TYPE_CHECKING:
    from penstock.io.spdk.environment import SpdkEnvironment

log = logging.getLogger(__name__)

MEASURE_S = 0.6  # over all members together
MEASURE_BLOCK_BYTES = 4 << 20

DRIVE_CLOSE_S = 5.0
OpenMember = MemoryMember | DeviceMember


def open_pool(config: PoolConfig, serves: bool = False) -> NodeBackend:
    """The pool that a configuration describes, nodes included: embedded in an engine, or (`serves`) for a pool node.
    Features that its members could not use here are logged. After an error, everything opened before is closed.

    Raises ValueError, OSError or PoolError with one line that says which member and what is wrong.
    """
    nodes = [member for member in config.members if member.kind == "node"]
    local = open_members_pool(config) if len(nodes) < len(config.members) else None
    for note in local.notes if local is not None else ():
        log.warning("%s", note)
    if not nodes:
        assert local is not None
        return local
    try:
        return _open_union(config, local, nodes, serves)
    except BaseException:
        if local is not None:
            local.close(1.0)
        raise


def open_members_pool(config: PoolConfig) -> LocalPool:
    """The pool of a configuration's own members; those of kind node are left out. Raises as `open_pool`."""
    local = [member for member in config.members if member.kind != "node"]
    with contextlib.ExitStack() as undo:
        opened = open_members(config, local, undo)
        weights = weights_of(config, local, opened)
        pool = LocalPool(opened, weights, policy_of(config, sum(one.capacity_bytes for one in opened)))
        undo.pop_all()
    return pool


def open_local_pool(
    memory: Sequence[int],
    slabs: Sequence[tuple[Path, int]],
    weights: Sequence[float] | None = None,
    state: Path | None = None,
    depth: int = DEPTH,
) -> LocalPool:
    """An embedded pool of memory members (`memory`: bytes of each) and slab members (path, bytes), as `config_of_flags`
    names them. Raises as `open_pool`."""
    return open_members_pool(config_of_flags(memory, slabs, weights, depth, state=state))


def open_members(config: PoolConfig, members: Iterable[MemberConfig], undo: contextlib.ExitStack) -> list[OpenMember]:
    """Open members in order, without starting them; `undo` closes them."""
    opened: list[OpenMember] = []
    members = list(members)
    refuse_two_names(members)
    for member in members:
        one = open_member(config, member)
        opened.append(one)
        undo.callback(_close_quietly, one)
    return opened


def refuse_two_names(members: Sequence[MemberConfig]) -> None:
    """Raise ConfigError for two members whose paths lead to the same file or device."""
    found: dict[object, Path] = {}
    for member in members:
        if member.path is not None and os.path.exists(member.path):
            first = found.setdefault(device_of(member.path), member.path)
            if first != member.path:
                raise ConfigError(f"{first} and {member.path} are two names of one slab; allowed: one member for it")


def open_member(config: PoolConfig, member: MemberConfig) -> OpenMember:
    """Open one member of this machine, without starting it. Raises ValueError or OSError."""
    pace = member.pace_bytes_per_s
    if member.kind == "memory":
        assert member.capacity_bytes is not None
        return MemoryMember(member.name, member.capacity_bytes, member.numa_node, pace)
    table = config.table_of(member)
    if member.kind == "uring":
        assert member.path is not None
        capacity_bytes = member.capacity_bytes or _whole_device(member.path)
        return open_slab_member(member.name, member.path, capacity_bytes, table, member.depth, pace)
    assert table is not None
    engine = open_drive(config, member)
    return open_device_member(member.name, str(member.where), PacedEngine(engine, pace) if pace else engine, table)


def open_drive(config: PoolConfig, member: MemberConfig) -> BlockEngine:
    """Open only the block engine of an nvme or spdk member. Raises ValueError or OSError."""
    return patiently(lambda: _open_nvme(member) if member.kind == "nvme" else _open_spdk(config, member))


def weights_of(config: PoolConfig, members: Sequence[MemberConfig], opened: Sequence[OpenMember]) -> list[float]:
    """Weight of each member: configured, else from the profile, else measured now; before members are started.
    Raises as `check_weights`, and where a member cannot be measured."""
    check_weights(config)
    known: Mapping[str, float] = read_profile(config.profile).weights() if config.profile else {}
    weights = [profiled_weight(known, member) if member.weight is None else member.weight for member in members]
    if len(config.members) == 1 and config.file is None and weights[0] is None:
        return [1.0]  # the only member, and none can be added
    unknown = [one for one, weight in zip(opened, weights, strict=True) if weight is None]
    if config.profile and unknown:
        log.warning("profile %s does not know %s: measured now", config.profile, ", ".join(m.name for m in unknown))
    measured = iter(_measure(unknown, config.block_bytes))
    return [next(measured) if weight is None else weight for weight in weights]


def profiled_weight(known: Mapping[str, float], member: MemberConfig) -> float | None:
    """A member's weight by the weights of the profile; None where it does not know the member."""
    return known[member.name] * member.part if member.name in known else None


def check_weights(config: PoolConfig) -> None:
    """Refuse weights of this machine's members that are on two scales, or all 0. Raises ConfigError."""
    known: Mapping[str, float] = read_profile(config.profile).weights() if config.profile else {}
    local = [member for member in config.members if member.kind != "node"]
    weights = [known.get(member.name) if member.weight is None else member.weight for member in local]
    unknown = [member for member, weight in zip(local, weights, strict=True) if weight is None]
    shares = [member.name for member in config.members if member.weight and member.weight < SHARES_BELOW]
    if shares and unknown:
        raise ConfigError(
            f"the weight of {shares[0]} is a share, that of {unknown[0].name} is its bandwidth; "
            "give all of them weights, or none"
        )
    if weights and not any(weight is None or weight > 0 for weight in weights):
        raise ConfigError("every weight is 0; allowed: at least one member with a weight above 0")


def policy_of(config: PoolConfig, capacity_bytes: int) -> PoolPolicy:
    """The policy of a pool of this capacity. Quotas apply to this node's members only. Shares follow the bandwidth
    where no weight is configured."""
    default, named = config.quota_bytes(capacity_bytes)
    follow = len(config.members) > 1 and all(member.weight is None for member in config.members)
    wanted = sum(named.values())
    if wanted > capacity_bytes:
        log.warning(
            "the quotas of [quota] tenants are %s together, the pool has %s: each counts for its part of that",
            format_bytes(wanted),
            format_bytes(capacity_bytes),
        )
    return PoolPolicy(
        config.write_admission, default, named, follow, config.named_tenants_only, copies_share=config.replicate
    )


def link_bytes_per_s(config: PoolConfig) -> dict[str, float]:
    """Initial values for an engine's cost model: bytes per second by link, for links in the profile."""
    profile: PoolProfile | None = read_profile(config.profile) if config.profile else None
    return profile.link_bytes_per_s() if profile else {}


def _open_union(
    config: PoolConfig, local: LocalPool | None, nodes: Sequence[MemberConfig], serves: bool
) -> NodeBackend:
    from penstock.pool.net.connect import open_union
    from penstock.pool.net.secret import Secret
    from penstock.pool.net.tls import PeerTls

    known = link_bytes_per_s(config)
    weights: list[float | None] = [] if local is None else [None]
    weights += [known.get(f"net@{node.address}") if node.weight is None else node.weight for node in nodes]
    secret = Secret.read(config.secret_file) if config.secret_file else None
    addresses = [str(node.address) for node in nodes]
    return open_union(local, addresses, weights, for_node=serves, secret=secret, tls=PeerTls.of(config))


def _open_nvme(member: MemberConfig) -> BlockEngine:
    from penstock.io.open import open_nvme

    assert member.path is not None
    return open_nvme(member.path, member.capacity_bytes, member.depth)


def _open_spdk(config: PoolConfig, member: MemberConfig) -> BlockEngine:
    from penstock.io.spdk.engine import open_spdk

    target, namespace = str(member.pcie or member.target), member.namespace
    capacity_bytes, environment = member.capacity_bytes, _spdk_environment(config)
    if capacity_bytes is None:  # the namespace's size is known only once it is open
        first = open_spdk(target, namespace, STAGING_ALIGNMENT_BYTES, 1, member.library, member.cpu, environment)
        capacity_bytes = first.info.size_bytes // STAGING_ALIGNMENT_BYTES * STAGING_ALIGNMENT_BYTES
        first.close(DRIVE_CLOSE_S)
    return open_spdk(target, namespace, capacity_bytes, member.depth, member.library, member.cpu, environment)


def _spdk_environment(config: PoolConfig) -> SpdkEnvironment | None:
    """The environment that members with several kinds of target need; None: the first target decides."""
    from penstock.io.spdk.environment import SpdkEnvironment

    spdk = [member for member in config.members if member.kind == "spdk"]
    drives = tuple(member.pcie for member in spdk if member.pcie)
    fabrics = [str(member.target).upper() for member in spdk if member.target]
    vfio_user = any("TRTYPE:VFIOUSER" in target for target in fabrics)
    if not (drives and fabrics) and not (vfio_user and len(fabrics) > 1):
        return None
    return SpdkEnvironment(pci_allowed=drives, no_pci=not drives, hugepage_single_segments=vfio_user)


def _whole_device(path: Path) -> int:
    """Bytes of a block device. Raises ConfigError for anything else."""
    if not path.is_block_device():
        raise ConfigError(f'capacity of {path} is "all"; allowed for a block device only, give a slab file its size')
    with path.open("rb") as device:
        return device.seek(0, os.SEEK_END)


def _measure(members: Sequence[OpenMember], block_bytes: int) -> list[float]:
    """Measure the read bandwidth of each member, for MEASURE_S in total."""
    budget_s = MEASURE_S / max(1, len(members))
    found = []
    for member in members:
        try:
            found.append(member.measure("read", min(block_bytes, MEASURE_BLOCK_BYTES), budget_s))
        except PoolError as error:
            raise ConfigError(f"{member.name} cannot be measured ({error.detail}); give it a weight") from None
    if found:
        rates = (f"{m.name} {b / 1e9:.2f} GB/s" for m, b in zip(members, found, strict=True))
        log.info("read bandwidth: %s", ", ".join(rates))
    return found


def _close_quietly(member: OpenMember) -> None:
    with contextlib.suppress(Exception):
        member.close(1.0)
