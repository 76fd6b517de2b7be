"""Tells the inter-engine scheduler core of engines and nodes: what they are, what they can do, and what they report.

A report costs O(engines of its host), however many others there are: the core hears of every host only when an engine
came or went, or when the first host reaches its pool again.
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

PREFILL_TOKENS_PER_S = 20_000.0  # of an engine that does not say
SPEED_MIN = 1e-3  # prompt tokens in a second; less is not believed
SPEED_MAX = 1e13  # tokens or bytes in a second; more is not believed
BATCH_TOKENS = 2048  # what the speed of prompts without hits is taken of


@dataclass(slots=True)
class _Account:
    """Of one engine: `unseen` are placements with reads that its report may not know of: (number of the placement,
    number of the read on its node)."""

    engine: RegisteredEngine
    placed: int = 0
    unseen: deque[tuple[int, int]] = field(default_factory=deque)


def prompt_tokens_per_s(cost: ComputeCost) -> float:
    """Of prompts without hits; infinite for a cost of 0."""
    seconds = cost.seconds([(BATCH_TOKENS, 0)])
    return BATCH_TOKENS / seconds if seconds > 0 else math.inf


def speed_of(report: EngineReport) -> tuple[float, ComputeCost | None]:
    """How many prompt tokens an engine computes in a second, and what a prompt costs there, where it says so."""
    if report.compute is None:
        return PREFILL_TOKENS_PER_S, None
    a, b, c = report.compute
    cost = ComputeCost(max(0.0, a), max(0.0, b), max(0.0, c))
    speed = prompt_tokens_per_s(cost)
    return (speed, cost) if SPEED_MIN < speed < SPEED_MAX else (PREFILL_TOKENS_PER_S, None)


class EngineAccounts:
    """A node of the scheduler core is a host: its engines share a storage NIC."""

    def __init__(self, scheduler: InterEngineScheduler) -> None:
        self._scheduler = scheduler
        self._accounts: dict[str, _Account] = {}
        self._hosts: dict[str, dict[str, _Account]] = {}  # of the engines that each has
        self._speeds = StorageSpeeds()
        self._left: set[str] = set()  # hosts that engines left since somebody said how fast his storage NIC is
        self._reach: dict[str, bool] = {}  # hosts, and whether they reach their pools, as the scheduler core was told
        self._reaching = 0  # hosts that do
        self._changed = False  # an engine came or went since the scheduler core was told

    def joined(self, engine: RegisteredEngine) -> None:
        """It has registered."""
        card, report = engine.card, engine.report
        account = _Account(engine)
        self._accounts[engine.name] = self._hosts.setdefault(card.host, {})[engine.name] = account
        self._changed = True
        speed, compute = speed_of(report)
        self._tell_storage_speed(engine)
        capacity = report.total_pages * card.block_tokens or card.max_context_tokens
        self._scheduler.engine_registered(
            EngineSpec(engine.name, card.role, card.role, card.host, speed, capacity, compute)
        )

    def left(self, engine: RegisteredEngine, now: float) -> None:
        """Its requests start over."""
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
        """A request was placed on the engine, which is to read so much for it."""
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
        self._tell_storage_speed(engine)
        self._scheduler.engine_speed(engine.name, *speed_of(engine.report))
        seen = min((one.unseen[0][1] - 1 for one in here if one.unseen), default=None)
        # An engine's queue has neither what waits for room in a decode buffer, nor what a prefill engine is still to
        # ask of this host's relay: a report adds to what the scheduler core counts itself, and takes nothing off.
        reported = sum(one.engine.report.read_queue_tokens for one in here)
        self._scheduler.report(host, max(reported, self._scheduler.unread_tokens(host, seen)), seen)
        self._tell_nic(host, now)

    def _tell_nic(self, host: str, now: float) -> None:
        """A host that does not reach its pool, while another one does, has lost its storage NIC."""
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

    def _tell_storage_speed(self, engine: RegisteredEngine) -> None:
        """What one host's storage NIC does tells something of the others'. Engines of a host share it: the fastest of
        them saw most of it."""
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
