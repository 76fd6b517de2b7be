"""Lookups in the pool: bounded in number, and each answered by its deadline, even if the pool hangs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from penstock.core.operations import BlockHit, Discard, Lookup
from penstock.engine.transfers import GRACE_S
from penstock.pool.api import Pool, PoolError
from penstock.process.guarded_thread import GuardedWorker
from penstock.process.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)

WAITING_RATIO = 4  # lookups that may wait or run, per thread

Answer = Callable[[list[BlockHit | None] | None], None]  # None: the pool did not answer


class Lookups:
    """Looks up on a few threads. `end_late` is for the control thread; all else for any thread."""

    def __init__(self, pool: Pool, threads: int) -> None:
        self._pool = pool
        self._busy_max = threads * WAITING_RATIO
        self._busy = 0  # lookups that wait or run, including those that were given up
        self._threads = GuardedWorker("penstock-lookup", self._busy_max, threads=threads)
        self._lock = threading.Lock()
        self._open: dict[int, tuple[float, Answer]] = {}  # operation -> (when it is given up, its answer callback)
        self._rare = RateLimitedLog(log)

    def ask(self, op: Lookup, answer: Answer) -> None:
        """`answer` is called once, from any thread: with None when too many wait already, after `close`, when the pool
        raises, or `GRACE_S` seconds after the deadline."""
        with self._lock:
            full = self._busy >= self._busy_max
            if not full:
                self._busy += 1
                self._open[op.op_id] = (time.monotonic() + op.timeout_s + GRACE_S, answer)
        if full:
            self._lost("full", f"{self._busy_max} lookups wait already")
            answer(None)
            return
        if not self._threads.put(partial(self._run, op)):  # after `close`
            self._lost("closed", "the engine is closing")
            self._end(op.op_id, None)

    def discard(self, op: Discard) -> None:
        """Have the pool drop blocks; when that fails they stay, and their next load finds them unusable again."""
        with self._lock:
            full = self._busy >= self._busy_max
            self._busy += not full
        if full or not self._threads.put(partial(self._run, op)):  # the latter after `close`
            self._rare.warning("discard", "%d unusable blocks stay in the pool: it is busy or closed", len(op.keys))

    def _run(self, op: Lookup | Discard) -> None:
        try:
            if isinstance(op, Discard):
                self._pool.evict(op.keys)
            elif op.op_id in self._open:  # not given up while it waited for a thread
                self._ask(op)
        except Exception as error:  # noqa: BLE001 (of a Discard; the thread goes on)
            self._rare.warning("discard", "unusable blocks stay in the pool: %r", error)
        finally:
            with self._lock:
                self._busy -= 1

    def _ask(self, op: Lookup) -> None:
        hits: list[BlockHit | None] | None = None
        try:
            found = self._pool.lookup(op.keys, op.timeout_s)
            hits = [None if hit is None else BlockHit(hit.size_bytes, hit.route) for hit in found]
        except PoolError as error:
            self._lost(error.reason, str(error))
        except Exception as error:  # of any kind: the request goes on without hits
            log.exception("a lookup raised")
            self._lost("raised", repr(error))
        if hits is not None and len(hits) != len(op.keys):
            self._lost("layout", f"{len(hits)} answers for {len(op.keys)} keys")
            hits = None
        self._end(op.op_id, hits)

    def _end(self, op_id: int, hits: list[BlockHit | None] | None) -> None:
        with self._lock:
            mine = self._open.pop(op_id, None)
        if mine is not None:
            mine[1](hits)

    def _lost(self, subject: str, why: str) -> None:
        self._rare.warning(subject, "a lookup failed, its request goes on without hits: %s", why)

    def end_late(self) -> None:
        """Answer lookups past their deadline with None."""
        now_s = time.monotonic()
        with self._lock:
            late = [op_id for op_id, (give_up_s, _) in self._open.items() if give_up_s <= now_s]
        for op_id in late:
            self._lost("deadline", "the pool did not answer by its deadline")
            self._end(op_id, None)

    def close(self) -> None:
        """Begin no further lookup; open ones are answered with None."""
        self._threads.close(0.0)
        with self._lock:
            left, self._open = self._open, {}
        for _, answer in left.values():
            answer(None)
