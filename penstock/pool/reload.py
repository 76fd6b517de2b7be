"""Applies a changed configuration to a running pool: members come and go, weights, quotas and admission change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence

from penstock.core.config import ConfigError
from penstock.pool.config import MemberConfig, PoolConfig
from penstock.pool.local import LocalPool
from penstock.pool.open import open_members, policy_of, weights_of
from penstock.pool.profile import read_profile

STAT_TIMEOUT_S = 1.0
_FIXED = ("name", "listen", "state", "pace_bytes_per_s")  # need a restart
ReadConfig = Callable[[Sequence[MemberConfig], Collection[str]], PoolConfig]


class LiveConfig:
    """The configuration that a pool runs with. Used by one thread."""

    def __init__(self, config: PoolConfig, pool: LocalPool, read: ReadConfig) -> None:
        """`read` gives the new configuration; it gets the members that run and names that cannot be given yet."""
        self.config = config
        self._pool = pool
        self._read = read
        self._leaving: dict[str, MemberConfig] = {}  # begun to drain, maybe gone by now

    def reload(self) -> list[str]:
        """Read again and apply; returns what changed, in words. Members that the file names no more begin to drain.

        Raises ValueError, OSError or PoolError with one line; the pool is then as it was.
        """
        old = self.config
        present = {member.name for member in self._pool.stat(STAT_TIMEOUT_S).members}
        self._leaving = {name: member for name, member in self._leaving.items() if name in present}
        new = self._read(old.members, self._leaving)
        running = {member.name: member for member in old.members}
        self._check(old, new, running)
        added = [member for member in new.members if member.name not in running]
        gone = [name for name in running if name not in {member.name for member in new.members}]
        profile = read_profile(new.profile).weights() if new.profile else {}
        with contextlib.ExitStack() as undo:
            opened = open_members(new, added, undo)
            weights = weights_of(new, added, opened)
            for one, weight in zip(opened, weights, strict=True):
                self._pool.add_member(one, weight)
            undo.pop_all()
        changes = [f"added {member.name}" for member in added]
        for member in new.members:
            before = running.get(member.name)
            weight_now = profile.get(member.name) if member.weight is None else member.weight
            if before is not None and weight_now is not None and (member.weight != before.weight or new.profile):
                self._pool.set_weight(member.name, weight_now)
                changes += [f"weight of {member.name}"] if member.weight != before.weight else []
        for name in gone:
            self._pool.drain_member(name)
            self._leaving[name] = running[name]
            changes.append(f"draining {name}")
        capacity_bytes = sum(
            m.capacity_bytes for m in self._pool.stat(STAT_TIMEOUT_S).members if m.name not in self._leaving
        )
        self._pool.set_policy(policy_of(new, capacity_bytes))
        if new.write_admission != old.write_admission:
            changes.append(f"write admission {new.write_admission}")
        if (new.default_quota, new.quotas) != (old.default_quota, old.quotas):
            changes.append("quotas")
        self.config = new
        return changes

    def _check(self, old: PoolConfig, new: PoolConfig, running: dict[str, MemberConfig]) -> None:
        """Raises ConfigError for what cannot change while the pool runs."""
        place = f"{new.file}: " if new.file else ""
        for name in _FIXED:
            if getattr(new, name) != getattr(old, name):
                raise ConfigError(
                    f"{place}{name.removesuffix('_bytes_per_s')} is changed; allowed: with a restart only"
                )
        if any(member.kind == "node" for member in (*new.members, *old.members)):
            raise ConfigError(f"{place}a pool with members of kind node was changed; allowed: with a restart only")
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
