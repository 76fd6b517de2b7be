"""Passes engines, hosts and their reports to the inter-engine scheduler core.

A report costs O(1), however many engines there are: each host has the sums of its engines' reports, which a new report
corrects. All hosts are passed to the core only when an engine joined or left, or when the first host reaches its pool
again; a host's engines are looked at when the report of the fastest one has become slower, and those that have
placements which their reports do not include yet.

Invariant, checked by `check_integrity`:
  HOSTS-1 A host's sums are those of the reports of its engines as they were counted last.
Verification: tests/cluster/router/test_heartbeat_cost.py.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from penstock.cluster.messages import EngineReport
from penstock.cluster.router.engine_registry import RegisteredEngine
from penstock.cluster.wire import EngineCard
from penstock.core.cluster.engine_groups import EngineSpec
from penstock.core.cluster.inter_engine import InterEngineScheduler
from penstock.core.cluster.nic_speed import StorageSpeeds
from penstock.core.cost import ComputeCost

PREFILL_TOKENS_PER_S = 20_000.0  # of an engine that does not report its speed
SPEED_MIN = 1e-3  # prompt tokens per second; a report outside SPEED_MIN to SPEED_MAX is ignored
SPEED_MAX = 1e13  # tokens or bytes per second; reported storage speeds are clipped to it
BATCH_TOKENS = 2048  # batch size for which the speed of prompts without hits is computed


@dataclass(slots=True)
class _Account:
    """One engine, with the report that its host's sums include. `unseen`: placements with reads that its report may not
    include yet, as (number of the placement, number of the read on its host)."""

    engine: RegisteredEngine
    counted: EngineReport
    cost: ComputeCost = field(default_factory=lambda: ComputeCost(0.0, 0.0, 0.0))
    placed: int = 0
    unseen: deque[tuple[int, int]] = field(default_factory=deque)

    def speed(self) -> tuple[float, ComputeCost | None]:
        """Prompt tokens per second, and the cost model if the engine reports one: as it is now, changed in place."""
        if self.counted.compute is None:
            return PREFILL_TOKENS_PER_S, None
        cost = self.cost
        cost.a, cost.b, cost.c = self.counted.compute
        speed = prompt_tokens_per_s(cost)
        return (speed, cost) if SPEED_MIN < speed < SPEED_MAX else (PREFILL_TOKENS_PER_S, None)


@dataclass(slots=True)
class _Host:
    """One host: its engines share a storage NIC. `late`: those with `unseen` placements."""

    engines: dict[str, _Account] = field(default_factory=dict)
    late: dict[str, _Account] = field(default_factory=dict)
    queued_tokens: int = 0  # read queues of all engines
    reaching: int = 0  # engines that reach the pool
    fastest: float = 0.0  # the largest storage speed, as reported

    def add(self, account: _Account) -> None:
        """An engine has registered."""
        self.engines[account.engine.name] = account
        report = account.counted
        self.queued_tokens += report.read_queue_tokens
        self.reaching += report.storage_up
        self.fastest = max(self.fastest, report.storage_bytes_per_s)

    def remove(self, name: str) -> None:
        """An engine has left; unknown ones are ignored."""
        account = self.engines.pop(name, None)
        self.late.pop(name, None)
        if account is not None:
            self.queued_tokens -= account.counted.read_queue_tokens
            self.reaching -= account.counted.storage_up
            self.fastest = self._fastest()

    def count(self, account: _Account, report: EngineReport) -> None:
        """A new report of one of the engines."""
        before, account.counted = account.counted, report
        self.queued_tokens += report.read_queue_tokens - before.read_queue_tokens
        self.reaching += report.storage_up - before.storage_up
        if report.storage_bytes_per_s >= self.fastest:
            self.fastest = report.storage_bytes_per_s
        elif before.storage_bytes_per_s == self.fastest:
            self.fastest = self._fastest()

    def _fastest(self) -> float:
        return max((one.counted.storage_bytes_per_s for one in self.engines.values()), default=0.0)

    def seen(self) -> int | None:
        """The number of the last read on this host that all engines' reports include; None: they include all."""
        return min(one.unseen[0][1] - 1 for one in self.late.values()) if self.late else None

    def check_integrity(self) -> None:
        """Assert HOSTS-1; O(engines)."""
        reports = [one.counted for one in self.engines.values()]
        assert self.queued_tokens == sum(one.read_queue_tokens for one in reports), "HOSTS-1: read queues"
        assert self.reaching == sum(one.storage_up for one in reports), "HOSTS-1: engines that reach the pool"
        assert self.fastest == self._fastest(), "HOSTS-1: the fastest engine"
        assert self.late == {name: one for name, one in self.engines.items() if one.unseen}, "HOSTS-1: late reports"


def prompt_tokens_per_s(cost: ComputeCost) -> float:
    """Speed for prompts without hits; infinite for a cost of 0."""
    seconds = cost.seconds([(BATCH_TOKENS, 0)])
    return BATCH_TOKENS / seconds if seconds > 0 else math.inf


class EngineAccounts:
    """All engines. A node of the scheduler core is a host: its engines share a storage NIC."""

    def __init__(self, scheduler: InterEngineScheduler) -> None:
        self._scheduler = scheduler
        self._accounts: dict[str, _Account] = {}
        self._hosts: dict[str, _Host] = {}
        self._speeds = StorageSpeeds()
        self._left: set[str] = set()  # hosts that engines left since the last report
        self._reach: dict[str, bool] = {}  # host -> whether it reaches its pool, as last passed to the scheduler core
        self._reaching = 0  # hosts that reach their pools
        self._changed = False  # an engine joined or left since the last update of the scheduler core

    def joined(self, engine: RegisteredEngine) -> None:
        """An engine has registered."""
        card, report = engine.card, engine.report
        account = self._accounts[engine.name] = _Account(engine, report)
        host = self._hosts.setdefault(card.host, _Host())
        host.add(account)
        self._changed = True
        speed, compute = account.speed()
        self._update_storage_speeds(card)
        capacity = report.total_pages * card.block_tokens or card.max_context_tokens
        self._scheduler.engine_registered(
            EngineSpec(
                engine.name, card.role, card.role, card.host, speed, capacity, compute, card.loads_behind_recomputed
            )
        )

    def left(self, engine: RegisteredEngine, now: float) -> None:
        """An engine has left; its requests are placed again."""
        name = engine.card.host
        host = self._hosts.get(name, _Host())
        host.remove(engine.name)
        if not host.engines:
            self._hosts.pop(name, None)
        self._accounts.pop(engine.name, None)
        self._left.add(name)
        self._changed = True
        self._scheduler.engine_lost(engine.name, now)
        if not host.engines:
            self._scheduler.node_lost(name, now)

    def placed(self, engine: RegisteredEngine, read_tokens: int) -> int:
        """A request was placed on the engine, which will read `read_tokens` for it; returns the placement's number."""
        account = self._accounts.get(engine.name)
        if account is None:
            return 0
        account.placed += 1
        if read_tokens:
            account.unseen.append((account.placed, self._scheduler.assigned_before(engine.card.host) + 1))
            self._hosts[engine.card.host].late[engine.name] = account
        return account.placed

    def reported(self, engine: RegisteredEngine, now: float) -> None:
        """The engine's report has changed."""
        card, scheduler = engine.card, self._scheduler
        account = self._accounts.get(card.name)
        if account is None:
            return
        name = card.host
        host, unseen = self._hosts[name], account.unseen
        if unseen:
            while unseen and unseen[0][0] <= engine.placed_seen:
                unseen.popleft()
            if not unseen:
                del host.late[card.name]
        before = host.fastest
        host.count(account, engine.report)
        if host.fastest != before or self._left:
            self._update_storage_speeds(card)
        scheduler.engine_speed(card.name, *account.speed())
        seen = host.seen()
        # A reported queue does not include requests that wait for room in a decode buffer, nor reads that a prefill
        # engine will still make through this host's relay: it may raise the scheduler core's count, never lower it.
        scheduler.report(name, max(host.queued_tokens, scheduler.unread_tokens(name, seen)), seen)
        if self._changed:
            self._update_all_nics(now)
        elif (host.reaching > 0) != self._reach[name]:
            self._update_nic(name, host.reaching > 0, now)

    def _update_all_nics(self, now: float) -> None:
        self._changed = False
        self._reach = {name: host.reaching > 0 for name, host in self._hosts.items()}
        self._reaching = sum(self._reach.values())
        for name in self._reach:
            self._pass_nic(name, now)

    def _update_nic(self, name: str, reaches: bool, now: float) -> None:
        some_reached = self._reaching > 0
        self._reach[name] = reaches
        self._reaching += 1 if reaches else -1
        for one in self._reach if some_reached != (self._reaching > 0) else (name,):
            self._pass_nic(one, now)

    def _pass_nic(self, name: str, now: float) -> None:
        """A host that does not reach its pool, while another host does, counts as having lost its storage NIC."""
        if not self._reach[name] and self._reaching:
            self._scheduler.nic_lost(name, now)
        else:
            self._scheduler.nic_healed(name)

    def _update_storage_speeds(self, card: EngineCard) -> None:
        """Update storage bandwidths, of this engine's host and of those that engines left. Engines of a host share its
        NIC: the largest report is used. A host without a report gets an estimate from the others."""
        names, self._left = {card.host, *self._left}, set()
        known = [(name, self._hosts.get(name)) for name in names]  # `self._hosts.keys() & names` looks at all hosts
        for name, host in known:
            if host is None:
                self._speeds.forget(name)
        for name, host in known:
            if host is None:
                continue
            nic = self._speeds.see(name, min(host.fastest, SPEED_MAX), card.block_tokens, card.block_bytes)
            self._scheduler.node_registered(name, nic)

    def check_integrity(self) -> None:
        """Assert HOSTS-1; O(engines)."""
        for host in self._hosts.values():
            host.check_integrity()
