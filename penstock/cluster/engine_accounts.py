"""Tells the inter-engine brain of engines and nodes: what they are, what they can do, and what they report."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.cluster.placed import EngineReport
from penstock.cluster.port import Engine
from penstock.core.cluster.engine_groups import EngineSpec
from penstock.core.cluster.inter_engine import InterEngineScheduler
from penstock.core.cluster.nic_speed import storage_speeds
from penstock.core.cost import ComputeCost

PREFILL_TOKENS_PER_S = 20_000.0  # of an engine that does not say
SPEED_MIN = 1e-3  # prompt tokens in a second; less is not believed
SPEED_MAX = 1e13  # tokens or bytes in a second; more is not believed
BATCH_TOKENS = 2048  # what the speed of prompts without hits is taken of


@dataclass(slots=True)
class _Account:
    """Placements on one engine with reads that its report may not know of: (number of the placement, number of the
    read on its node)."""

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
    """A node of the brain is a host: its engines share a storage NIC."""

    def __init__(self, brain: InterEngineScheduler) -> None:
        self._brain = brain
        self._accounts: dict[str, _Account] = {}
        self._assigned: dict[str, int] = {}

    def joined(self, engine: Engine, engines: Sequence[Engine]) -> None:
        """`engines` are all that are registered, this one too."""
        card, report = engine.card, engine.report
        self._accounts[engine.name] = _Account()
        speed, compute = speed_of(report)
        self._tell_storage_speeds(engines)
        capacity = report.total_pages * card.block_tokens or card.max_context_tokens
        self._brain.engine_registered(
            EngineSpec(engine.name, card.role, card.role, card.host, speed, capacity, compute)
        )

    def left(self, engine: Engine, others: Sequence[Engine], now: float) -> None:
        """Its requests start over."""
        self._accounts.pop(engine.name, None)
        self._brain.engine_lost(engine.name, now)
        if all(other.card.host != engine.card.host for other in others):
            self._brain.node_lost(engine.card.host, now)

    def deciding(self) -> None:
        """Before the brain decides: the reads that it assigns have higher numbers than these."""
        self._assigned = {name: self._brain.assigned(name) for name in self._brain.groups.nodes}

    def placed(self, engine: Engine, read_tokens: int) -> None:
        """A request was placed on the engine, which is to read so much for it."""
        account = self._accounts.get(engine.name)
        if account is not None:
            account.placed += 1
            if read_tokens:
                account.unseen.append((account.placed, self._assigned.get(engine.card.host, 0) + 1))

    def reported(self, engine: Engine, engines: Sequence[Engine], now: float) -> None:
        """The engine's report has changed."""
        account = self._accounts.get(engine.name)
        if account is None:
            return
        while account.unseen and account.unseen[0][0] <= engine.placed_seen:
            account.unseen.popleft()
        host = engine.card.host
        here = [other for other in engines if other.card.host == host]
        self._tell_storage_speeds(engines)
        self._brain.engine_speed(engine.name, *speed_of(engine.report))
        accounts = [self._accounts[other.name] for other in here if other.name in self._accounts]
        seen = min((one.unseen[0][1] - 1 for one in accounts if one.unseen), default=None)
        # An engine's queue has neither what waits for room in a decode buffer, nor what a prefill engine is still to
        # ask of this host's relay: a report adds to what the brain counts itself, and takes nothing off.
        reported = sum(other.report.read_queue_tokens for other in here)
        self._brain.report(host, max(reported, self._brain.unread_tokens(host, seen)), seen)
        self._tell_nics(engines, now)

    def _tell_nics(self, engines: Sequence[Engine], now: float) -> None:
        """A host that does not reach its pool, while another one does, has lost its storage NIC."""
        up: dict[str, bool] = {}
        for engine in engines:
            up[engine.card.host] = up.get(engine.card.host, False) or engine.report.storage_up
        for host, reaches in up.items():
            if not reaches and any(up.values()):
                self._brain.nic_lost(host, now)
            else:
                self._brain.nic_healed(host)

    def _tell_storage_speeds(self, engines: Sequence[Engine]) -> None:
        """What one host's storage NIC does tells something of the others'. Engines of a host share it: the fastest of
        them saw most of it."""
        seen: dict[str, float] = {}
        for engine in engines:
            fastest = max(seen.get(engine.card.host, 0.0), engine.report.storage_bytes_per_s)
            seen[engine.card.host] = min(fastest, SPEED_MAX)
        card = engines[0].card  # the geometry is the same for all
        for host, bytes_per_s in storage_speeds(seen).items():
            self._brain.node_registered(host, max(1.0, bytes_per_s * card.block_tokens / card.block_bytes))
