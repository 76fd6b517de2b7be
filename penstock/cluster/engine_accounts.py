"""Tells the inter-engine brain of engines and nodes: what they are, what they can do, and what they report."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.cluster.port import Engine
from penstock.core.engine_groups import EngineSpec
from penstock.core.inter_engine import InterEngineScheduler

STORAGE_BYTES_PER_S = 1e9  # of a node that has not measured its storage NIC yet
PREFILL_TOKENS_PER_S = 20_000.0  # of an engine that does not say


@dataclass(slots=True)
class _Account:
    """Placements on one engine with reads that its report may not know of: (number of the placement, number of the
    read on its node)."""

    placed: int = 0
    unseen: deque[tuple[int, int]] = field(default_factory=deque)


class EngineAccounts:
    """A node of the brain is a host: its engines share a storage NIC."""

    def __init__(self, brain: InterEngineScheduler) -> None:
        self._brain = brain
        self._accounts: dict[str, _Account] = {}
        self._assigned: dict[str, int] = {}

    def joined(self, engine: Engine) -> None:
        card, report = engine.card, engine.report
        self._accounts[engine.name] = _Account()
        self._brain.node_registered(card.host, self._storage_tokens_per_s([engine]))
        capacity = report.total_pages * card.block_tokens or card.max_context_tokens
        speed = card.prefill_tokens_per_s or PREFILL_TOKENS_PER_S
        self._brain.engine_registered(EngineSpec(engine.name, card.role, card.role, card.host, speed, capacity))

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
        self._brain.node_registered(host, self._storage_tokens_per_s(here))
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

    @staticmethod
    def _storage_tokens_per_s(engines: Sequence[Engine]) -> float:
        """Of the storage NIC that these engines share, as the busiest of them saw it."""
        seen = max((engine.report.storage_bytes_per_s for engine in engines), default=0.0) or STORAGE_BYTES_PER_S
        card = engines[0].card
        return max(1.0, seen * card.block_tokens / card.block_bytes)
