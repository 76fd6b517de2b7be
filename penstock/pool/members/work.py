"""The queue of a member's work: loads before stores, both bounded, no work left in it past its deadline."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from penstock.core.pool.fair_queue import FairQueue
from penstock.pool.api import PoolError
from penstock.pool.block import Block
from penstock.process.guarded_thread import count_failure

log = logging.getLogger(__name__)

EXPIRY_CHECK_S = 0.01


@dataclass(slots=True, eq=False)
class Work:
    """One load into, or store from, `buffer` (as long as the block's extent). `finish` is called exactly once, on the
    member's thread. A store starts once the member's journal has committed up to `after`."""

    kind: Literal["load", "store"]
    block: Block
    buffer: memoryview
    deadline_s: float
    finish: Callable[[Work, PoolError | None], None]
    after: int = 0


def finish_work(work: Work, error: PoolError | None) -> None:
    """Call the work's `finish`; an exception in it is logged and counted, and affects no other work."""
    try:
        work.finish(work, error)
    except Exception:
        count_failure("penstock-work-callback")
        log.exception("the callback at the end of a %s failed", work.kind)


class WorkQueue:
    """Many threads put, the member's worker takes. Loads, and stores, are taken fairly among the accounts to which
    their blocks are charged; those of one account in order. A full queue still accepts work of an account that has
    little in it: the last work of the account that has most is displaced."""

    def __init__(self, loads_max: int, stores_max: int) -> None:
        self._max = {"load": loads_max, "store": stores_max}
        self._loads: FairQueue[Work] = FairQueue()
        self._stores: FairQueue[Work] = FairQueue()
        self._displaced: deque[Work] = deque()  # the worker ends it
        self._changed = threading.Condition()
        self._closed = False
        self._kicked = False
        self._next_check_s = 0.0

    @property
    def closed(self) -> bool:
        """Whether `close` was called: nothing is accepted any more."""
        return self._closed

    def lengths(self) -> tuple[int, int]:
        """Loads and stores that wait."""
        return len(self._loads), len(self._stores)

    def put(self, work: Work) -> PoolError | None:
        """Queue work; returns the error when it was not queued."""
        with self._changed:
            if self._closed:
                return PoolError("closed", "the pool is closing")
            queue = self._loads if work.kind == "load" else self._stores
            account = work.block.account
            if len(queue) >= self._max[work.kind]:
                # Displaced work is bounded too: a worker that hangs does not end it.
                room = len(self._displaced) < self._max[work.kind]
                displaced = queue.displace(account) if room else None
                if displaced is None:
                    return PoolError("dropped", f"{len(queue)} {work.kind}s wait for this member; that is the limit")
                self._displaced.append(displaced)
            queue.put(work, account, work.block.extent_bytes)
            self._changed.notify()
            return None

    def take_load(self) -> Work | None:
        """The next load, fairly among accounts; None when there is none. Does not wait."""
        with self._changed:
            return self._loads.take()

    def take_loads(self, at_most: int) -> list[Work]:
        """The next loads, fairly among accounts; none when there is none. Does not wait."""
        with self._changed:
            return [work for _ in range(min(at_most, len(self._loads))) if (work := self._loads.take()) is not None]

    def take_store(self, committed: int) -> Work | None:
        """The next store; None while a load waits, or while the row of the extent's old block is not deleted yet."""
        with self._changed:
            store = self._stores.peek()
            if self._loads or store is None or store.after > committed:
                return None
            return self._stores.take()

    def ready(self, committed: int, stores: bool) -> bool:
        """Whether `take_load`, or, if `stores`, `take_store` would return work now."""
        with self._changed:
            store = self._stores.peek() if stores else None
            return bool(self._loads) or (store is not None and store.after <= committed)

    def expired(self) -> list[Work]:
        """Take out the work whose deadline has passed; checked every `EXPIRY_CHECK_S`."""
        now_s = time.monotonic()
        if now_s < self._next_check_s:
            return []
        self._next_check_s = now_s + EXPIRY_CHECK_S
        with self._changed:
            late: list[Work] = []
            if self._loads:
                late = self._loads.remove_if(lambda work: work.deadline_s <= now_s)
            if self._stores:
                late += self._stores.remove_if(lambda work: work.deadline_s <= now_s)
        return late

    def displaced(self) -> list[Work]:
        """Take out the work that was displaced by that of another account; the caller ends it as "dropped"."""
        with self._changed:
            gone = list(self._displaced)
            self._displaced.clear()
        return gone

    def wait(self, timeout_s: float = 1.0) -> None:
        """Return after `put`, `kick` or `close`; at the latest in time for the next deadline check."""
        with self._changed:
            waiting = bool(self._loads or self._stores)
            if self._closed or self._kicked or self._loads:
                self._kicked = False
                return
            self._changed.wait(min(timeout_s, EXPIRY_CHECK_S) if waiting else timeout_s)
            self._kicked = False

    def kick(self) -> None:
        """Wake the worker: a commit may have freed extents that stores wait for."""
        with self._changed:
            self._kicked = True
            self._changed.notify()

    def close(self) -> None:
        """Accept no more work, and wake the worker."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def drain(self, *kinds: Literal["load", "store"]) -> list[Work]:
        """Take out all work of these kinds (none given: of both) that still waits."""
        with self._changed:
            rest: list[Work] = []
            if not kinds or "load" in kinds:
                rest.extend(self._loads.drain())
            if not kinds or "store" in kinds:
                rest.extend(self._stores.drain())
            if not kinds:
                rest.extend(self._displaced)
                self._displaced.clear()
            return rest
