"""A body of the brain on a virtual clock: ideal links that serve block by block, compute that takes what a model says.

One history per input. It carries the brain's tests, and gives live experiments their bound: the same decisions with no
overhead anywhere and no link idle while it has work.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from penstock.core.cost import ComputeCost
from penstock.core.keys import BlockKey
from penstock.core.operations import (
    Account,
    BlockHit,
    Compute,
    Emit,
    Fetch,
    Lookup,
    Operation,
    RequestSpec,
    Save,
    Upload,
)
from penstock.core.scheduler import LoadScheduler


@dataclass(frozen=True, slots=True)
class Ended:
    """How one request ended, its tokens, and its account."""

    reason: str
    tokens: tuple[int, ...]
    account: Account


class VirtualBody:
    """Runs a `LoadScheduler` to the end of a list of arrivals.

    `pool` maps keys to hits; blocks that are saved join it under `save_route`. `link_bytes_per_s` names each link's
    speed; `fail_fetch(key)` may return a reason label to make that fetch fail.
    """

    def __init__(
        self,
        scheduler: LoadScheduler,
        pool: dict[BlockKey, BlockHit],
        link_bytes_per_s: Mapping[str, float],
        upload_bytes_per_s: float,
        compute: ComputeCost,
        save_route: tuple[str, ...] | None = None,
        fail_fetch: Callable[[BlockKey], str | None] = lambda key: None,
        check: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.now = 0.0
        self.ended: dict[str, Ended] = {}
        self.fetches: list[BlockKey] = []
        self._pool = pool
        self._speed = dict(link_bytes_per_s)
        self._upload_bytes_per_s = upload_bytes_per_s
        self._compute = compute
        self._save_route = save_route
        self._fail_fetch = fail_fetch
        self._check = check
        self._free_at: dict[str, float] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self._tokens: dict[str, list[int]] = {}

    def at(self, time_s: float, event: Callable[[], None]) -> None:
        """Run `event` at a virtual time."""
        self._serial += 1
        heapq.heappush(self._events, (time_s, self._serial, event))

    def submit_at(self, time_s: float, spec: RequestSpec) -> None:
        self.at(time_s, lambda: self.scheduler.submit(spec, self.now))

    def run(self, until_s: float = float("inf")) -> None:
        """Process events in order of time until none is left (or the next is past `until_s`)."""
        while self._events and self._events[0][0] <= until_s:
            wakeup = self.scheduler.next_wakeup_s()
            time_s = self._events[0][0]
            if wakeup is not None and self.now < wakeup < time_s:
                self.now = wakeup
            else:
                self.now, _, event = heapq.heappop(self._events)
                event()
            for operation in self.scheduler.decide(self.now):
                self._carry_out(operation)
            if self._check:
                self.scheduler.check_integrity()

    def _serve(self, links: Sequence[tuple[str, float]]) -> float:
        """Time at which all `(link, seconds)` have served this operation, each after what it had before."""
        done = self.now
        for name, seconds in links:
            self._free_at[name] = max(self.now, self._free_at.get(name, 0.0)) + seconds
            done = max(done, self._free_at[name])
        return done

    def _carry_out(self, operation: Operation) -> None:
        if isinstance(operation, Emit):
            self._emit(operation)
        elif isinstance(operation, Lookup):
            hits = [self._pool.get(key) for key in operation.keys]
            self.at(self.now, lambda: self.scheduler.lookup_done(operation.op_id, hits, self.now))
        elif isinstance(operation, Fetch):
            self._fetch(operation)
        elif isinstance(operation, Upload):
            size = len(operation.blocks) * self.scheduler.config.block_bytes
            done = self._serve([("upload", size / self._upload_bytes_per_s)])
            self.at(done, lambda: self.scheduler.uploaded(operation.op_id, self.now))
        elif isinstance(operation, Compute):
            seconds = self._compute.seconds([(len(c.tokens), c.start) for c in operation.chunks])
            sampled = [self._sample(c.start + len(c.tokens)) if c.sample else None for c in operation.chunks]
            self.at(self.now + seconds, lambda: self.scheduler.computed(operation.op_id, sampled, self.now))
        elif isinstance(operation, Save):
            self._save(operation)

    @staticmethod
    def _sample(position: int) -> int:
        return 1000 + position % 97

    def _fetch(self, operation: Fetch) -> None:
        self.fetches.append(operation.key)
        size = self.scheduler.config.block_bytes
        error = self._fail_fetch(operation.key)
        if error is not None:
            self._pool.pop(operation.key, None)
        done = self._serve([(name, size / self._speed[name]) for name in operation.route])
        self.at(done, lambda: self.scheduler.fetched(operation.op_id, error, self.now))

    def _save(self, operation: Save) -> None:
        def saved() -> None:
            self.scheduler.downloaded(operation.op_id)
            if self._save_route is not None:
                self._pool[operation.block.key] = BlockHit(operation.block.size_bytes, self._save_route)
            self.scheduler.saved(operation.op_id, None)

        self.at(self.now + 1e-3, saved)

    def _emit(self, operation: Emit) -> None:
        tokens = self._tokens.setdefault(operation.request_id, [])
        if operation.token is not None:
            tokens.append(operation.token)
        if operation.finish_reason is not None:
            assert operation.account is not None and operation.request_id not in self.ended
            self.ended[operation.request_id] = Ended(operation.finish_reason, tuple(tokens), operation.account)
            del self._tokens[operation.request_id]
