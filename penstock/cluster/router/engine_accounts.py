"""Passes engines, hosts and their reports to the inter-engine scheduler core.

A report costs O(engines of its host), however many other engines there are: all hosts are passed to the core only when
an engine joined or left, or when the first host reaches its pool again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from penstock.cluster.messages import EngineReport
from penstock.cluster.router.engine_registry import RegisteredEngine
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
    """One engine. `unseen`: placements with reads that its report may not include yet, as (number of the placement,
    number of the read on its host)."""

    engine: RegisteredEngine
    placed: int = 0
    unseen: deque[tuple[int, int]] = field(default_factory=deque)


def prompt_tokens_per_s(cost: ComputeCost) -> float:
    """Speed for prompts without hits; infinite for a cost of 0."""
    seconds = cost.seconds([(BATCH_TOKENS, 0)])
    return BATCH_TOKENS / seconds if seconds > 0 else math.inf


def speed_of(report: EngineReport) -> tuple[float, ComputeCost | None]:
    """Prompt tokens per second of an engine, and its cost model if it reports one."""
    if report.compute is None:
        return PREFILL_TOKENS_PER_S, None
    a, b, c = report.compute
    cost = ComputeCost(max(0.0, a), max(0.0, b), max(0.0, c))
    speed = prompt_tokens_per_s(cost)
    return (speed, cost) if SPEED_MIN < speed < SPEED_MAX else (PREFILL_TOKENS_PER_S, None)


class EngineAccounts:
    """All engines. A node of the scheduler core is a host: its engines share a storage NIC."""

    def __init__(self, scheduler: InterEngineScheduler) -> None:
        self._scheduler = scheduler
        self._accounts: dict[str, _Account] = {}
        self._hosts: dict[str, dict[str, _Account]] = {}  # host -> its engines
        self._speeds = StorageSpeeds()
        self._left: set[str] = set()  # hosts that engines left since the last report of a storage NIC's speed
        self._reach: dict[str, bool] = {}  # host -> whether it reaches its pool, as last passed to the scheduler core
        self._reaching = 0  # hosts that reach their pools
        self._changed = False  # an engine joined or left since the last update of the scheduler core

    def joined(self, engine: RegisteredEngine) -> None:
        """An engine has registered."""
        card, report = engine.card, engine.report
        account = _Account(engine)
        self._accounts[engine.name] = self._hosts.setdefault(card.host, {})[engine.name] = account
        self._changed = True
        speed, compute = speed_of(report)
        self._update_storage_speed(engine)
        capacity = report.total_pages * card.block_tokens or card.max_context_tokens
        self._scheduler.engine_registered(
            EngineSpec(engine.name, card.role, card.role, card.host, speed, capacity, compute)
        )

    def left(self, engine: RegisteredEngine, now: float) -> None:
        """An engine has left; its requests are placed again."""
        host = engine.card.host
        here = self._hosts.get(host, {})
        here.pop(engine.name, None)
        if not here:
            self._hosts.pop(host, None)
        self._accounts.pop(engine.name, None)
        self._left.add(host)
        self._changed = True
        self._scheduler.engine_lost(engine.name, now)
        if not here:
            self._scheduler.node_lost(host, now)

    def placed(self, engine: RegisteredEngine, read_tokens: int) -> None:
        """A request was placed on the engine, which will read `read_tokens` for it."""
        account = self._accounts.get(engine.name)
        if account is not None:
            account.placed += 1
            if read_tokens:
                account.unseen.append((account.placed, self._scheduler.assigned_before(engine.card.host) + 1))

    def reported(self, engine: RegisteredEngine, now: float) -> None:
        """The engine's report has changed."""
        account = self._accounts.get(engine.name)
        if account is None:
            return
        while account.unseen and account.unseen[0][0] <= engine.placed_seen:
            account.unseen.popleft()
        host = engine.card.host
        here = self._hosts[host].values()
        self._update_storage_speed(engine)
        self._scheduler.engine_speed(engine.name, *speed_of(engine.report))
        seen = min((one.unseen[0][1] - 1 for one in here if one.unseen), default=None)
        # A reported queue does not include requests that wait for room in a decode buffer, nor reads that a prefill
        # engine will still make through this host's relay: it may raise the scheduler core's count, never lower it.
        reported = sum(one.engine.report.read_queue_tokens for one in here)
        self._scheduler.report(host, max(reported, self._scheduler.unread_tokens(host, seen)), seen)
        self._update_nic(host, now)

    def _update_nic(self, host: str, now: float) -> None:
        """A host that does not reach its pool, while another host does, counts as having lost its storage NIC."""
        some_reached = self._reaching > 0
        tell: Iterable[str] = ()
        if self._changed:
            self._changed = False
            reach: dict[str, bool] = {}
            for account in self._accounts.values():
                at = account.engine.card.host
                reach[at] = reach.get(at, False) or account.engine.report.storage_up
            self._reach, self._reaching = reach, sum(reach.values())
            tell = reach
        else:
            reaches = any(account.engine.report.storage_up for account in self._hosts[host].values())
            if reaches != self._reach[host]:
                self._reach[host] = reaches
                self._reaching += 1 if reaches else -1
                tell = self._reach if some_reached != (self._reaching > 0) else (host,)
        for one in tell:
            if not self._reach[one] and self._reaching:
                self._scheduler.nic_lost(one, now)
            else:
                self._scheduler.nic_healed(one)

    def _update_storage_speed(self, engine: RegisteredEngine) -> None:
        """Update storage bandwidths. Engines of a host share its NIC: the largest report is used. A host without a
        report gets an estimate from the others."""
        card = engine.card
        self._left.add(card.host)
        for host in self._left:
            here = self._hosts.get(host)
            if here is None:
                self._speeds.forget(host)
                continue
            fastest = min(max(account.engine.report.storage_bytes_per_s for account in here.values()), SPEED_MAX)
            nic = self._speeds.see(host, fastest, card.block_tokens, card.block_bytes)
            self._scheduler.node_registered(host, nic)
        self._left.clear()
