"""Applies a changed configuration to a running pool: members, weights, quotas and write admission."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields

from penstock.core.config import ConfigError
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.setup.config import MemberConfig, NodeSettings, PoolConfig
from penstock.pool.setup.open import (
    OpenMember,
    check_weights,
    link_bytes_per_s,
    open_members,
    policy_of,
    profiled_weight,
    weights_of,
)
from penstock.pool.setup.profile import read_profile
from penstock.pool.union.union_pool import UnionPool

STAT_TIMEOUT_S = 1.0
DROP_TIMEOUT_S = 10.0  # for reads from a node that is dropped
ReadConfig = Callable[[Sequence[MemberConfig], Collection[str]], PoolConfig]


@dataclass(frozen=True, slots=True)
class PreparedChange:
    """A configuration that can be applied: its new members, those of this machine as they were opened, and what closes
    them again."""

    new: PoolConfig
    added: Sequence[MemberConfig]
    opened: Sequence[OpenMember]
    weights: Sequence[float]
    undo: contextlib.ExitStack


class LiveConfig:
    """The configuration that a pool runs with. Used by one thread.

    RELOAD-1  Statement: A file is applied as a whole or not at all: everything that can be refused is checked before
              the first change, or undone.
    Verification: tests/pool/setup/test_pool_live.py.
    """

    def __init__(self, config: PoolConfig, pool: LocalPool | None, union: UnionPool | None, read: ReadConfig) -> None:
        """`pool` has the members of this machine, `union` those of kind node, None where there were none at start.
        `read` returns the new configuration; its arguments are the running members, and names that are still
        reserved."""
        self.config = config
        self._pool = pool
        self._union = union
        self._read = read
        self._leaving: dict[str, MemberConfig] = {}  # being drained, or drained already

    def reload(self) -> list[str]:
        """Read the configuration again and apply it; returns the changes as texts. Members that are no longer in the
        file begin to drain.

        Raises ValueError, OSError or PoolError with one line; the pool is then unchanged.
        """
        return self.apply(self.prepare())

    def prepare(self) -> PreparedChange:
        """Read the configuration again, check it, and open what is new; `apply` or `discard` must follow. Raises as
        `reload`."""
        old = self.config
        present = {member.name for member in self._pool.stat(STAT_TIMEOUT_S).members} if self._pool else set()
        self._leaving = {name: member for name, member in self._leaving.items() if name in present}
        new = self._read(old.members, self._leaving)
        running = {member.name: member for member in old.members}
        self._check(old, new, running)
        added = [member for member in new.members if member.name not in running]
        local = [member for member in added if member.kind != "node"]
        with contextlib.ExitStack() as undo:
            opened = open_members(new, local, undo)
            weights = weights_of(new, local, opened)
            for node in added:
                if node.kind == "node":
                    self._add_node(new, node, undo)
            return PreparedChange(new, added, opened, weights, undo.pop_all())

    def discard(self, change: PreparedChange) -> None:
        """Close what was opened for a change; the pool is unchanged."""
        change.undo.close()

    def apply(self, change: PreparedChange) -> list[str]:
        """Apply a prepared change; returns the changes as texts."""
        old, new = self.config, change.new
        running = {member.name: member for member in old.members}
        with change.undo as undo:
            for one, weight in zip(change.opened, change.weights, strict=True):
                assert self._pool is not None
                self._pool.add_member(one, weight)
            undo.pop_all()
        changes = [f"added {member.name}" for member in change.added] + self._weigh(new, running)
        kept = {member.name for member in new.members}
        changes += [self._remove(member) for member in old.members if member.name not in kept]
        if self._pool is not None:
            members = self._pool.stat(STAT_TIMEOUT_S).members
            capacity_bytes = sum(m.capacity_bytes for m in members if m.name not in self._leaving)
            self._pool.set_policy(policy_of(new, capacity_bytes))
        if new.write_admission != old.write_admission:
            changes.append(f"write admission {new.write_admission}")
        if _quotas_of(new) != _quotas_of(old):
            changes.append("quotas")
        self.config = new
        return changes

    def _add_node(self, new: PoolConfig, node: MemberConfig, undo: contextlib.ExitStack) -> None:
        from penstock.pool.net.connect import add_node
        from penstock.pool.net.secret import Secret
        from penstock.pool.net.tls import PeerTls

        assert self._union is not None
        known = link_bytes_per_s(new).get(f"net@{node.address}")
        secret = Secret.read(new.secret_file) if new.secret_file else None
        weight = known if node.weight is None else node.weight
        add_node(self._union, str(node.address), weight, secret=secret, tls=PeerTls.of(new))
        undo.callback(self._union.drop_node, str(node.address), DROP_TIMEOUT_S)

    def _weigh(self, new: PoolConfig, running: dict[str, MemberConfig]) -> list[str]:
        """Update the weights of members that stay: as configured now, else from the profile."""
        profile = read_profile(new.profile).weights() if new.profile else {}
        changes = []
        for member in new.members:
            before = running.get(member.name)
            weight = profiled_weight(profile, member) if member.weight is None else member.weight
            if before is None or weight is None or not (member.weight != before.weight or new.profile):
                continue
            if member.kind != "node" and self._pool is not None:
                self._pool.set_weight(member.name, weight)
            elif member.kind == "node" and self._union is not None and member.weight is not None:
                self._union.set_node_weight(str(member.address), weight)
            changes += [f"weight of {member.name}"] if member.weight != before.weight else []
        return changes

    def _remove(self, member: MemberConfig) -> str:
        """Drain a member of this machine; disconnect a node, which keeps its blocks."""
        if member.kind == "node":
            assert self._union is not None
            self._union.drop_node(str(member.address), DROP_TIMEOUT_S)
            return f"without {member.name}"
        assert self._pool is not None
        self._pool.drain_member(member.name)
        self._leaving[member.name] = member
        return f"draining {member.name}"

    def _check(self, old: PoolConfig, new: PoolConfig, running: dict[str, MemberConfig]) -> None:
        """Raise ConfigError for changes that need a restart."""
        place = f"{new.file}: " if new.file else ""
        for name in (one.name for one in fields(NodeSettings)):
            if getattr(new, name) != getattr(old, name):
                raise ConfigError(
                    f"{place}{name.removesuffix('_bytes_per_s')} is changed; allowed: with a restart only"
                )
        if self._pool is not None and all(member.kind == "node" for member in new.members):
            raise ConfigError(f"{place}the last member of this machine is gone; allowed: with a restart only")
        check_weights(new)
        for member in new.members:
            if (self._union if member.kind == "node" else self._pool) is None:
                what = "node" if member.kind == "node" else "this machine"
                raise ConfigError(f"{place}{member.name} is the first member of {what}; allowed: with a restart only")
        for member in new.members:
            before = running.get(member.name)
            if before is not None and not before.same_place(member):
                raise ConfigError(
                    f"{place}{member.name} is another member than before; allowed: a weight, or a member of a new name"
                )
            if before is None and member.where is not None:
                holder = next(
                    (m.name for m in (*old.members, *self._leaving.values()) if m.where == member.where), None
                )
                if holder is not None:
                    raise ConfigError(f"{place}{member.where} is still that of {holder}; allowed: once it is gone")
            if member.name in self._leaving:
                raise ConfigError(f"{place}{member.name} is being drained; allowed: once it is gone, or another name")


def _quotas_of(config: PoolConfig) -> tuple[object, ...]:
    return config.default_quota, config.quotas, config.named_tenants_only
