"""The queue in front of a member: loads before stores, both bounded, none kept past its deadline."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from penstock.pool.api import PoolError
from penstock.pool.table import Block

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


class WorkQueue:
    """Many threads put, the member's worker takes."""

    def __init__(self, loads_max: int, stores_max: int) -> None:
        self._max = {"load": loads_max, "store": stores_max}
        self._queues: dict[str, deque[Work]] = {"load": deque(), "store": deque()}
        self._changed = threading.Condition()
        self._closed = False
        self._kicked = False
        self._next_check_s = 0.0

    @property
    def closed(self) -> bool:
        return self._closed

    def put(self, work: Work) -> PoolError | None:
        """Queue work; the error says why it was not."""
        with self._changed:
            if self._closed:
                return PoolError("closed", "the pool is closing")
            queue = self._queues[work.kind]
            if len(queue) >= self._max[work.kind]:
                return PoolError("dropped", f"{len(queue)} {work.kind}s wait for this member; that is the limit")
            queue.append(work)
            self._changed.notify()
            return None

    def take_load(self) -> Work | None:
        with self._changed:
            queue = self._queues["load"]
            return queue.popleft() if queue else None

    def take_store(self, committed: int) -> Work | None:
        """The oldest store, unless a load waits or the store's extent is not free of its old row yet."""
        with self._changed:
            stores = self._queues["store"]
            if self._queues["load"] or not stores or stores[0].after > committed:
                return None
            return stores.popleft()

    def expired(self) -> list[Work]:
        """Work whose deadline has passed, taken out; looked for every `EXPIRY_CHECK_S`."""
        now_s = time.monotonic()
        if now_s < self._next_check_s:
            return []
        self._next_check_s = now_s + EXPIRY_CHECK_S
        late: list[Work] = []
        with self._changed:
            for kind, queue in self._queues.items():
                if any(work.deadline_s <= now_s for work in queue):
                    late.extend(work for work in queue if work.deadline_s <= now_s)
                    self._queues[kind] = deque(work for work in queue if work.deadline_s > now_s)
        return late

    def wait(self) -> None:
        """Return when something was put, kicked or closed; at the latest in time for the next deadline check."""
        with self._changed:
            waiting = any(self._queues.values())
            if self._closed or self._kicked or self._queues["load"]:
                self._kicked = False
                return
            self._changed.wait(EXPIRY_CHECK_S if waiting else 1.0)
            self._kicked = False

    def kick(self) -> None:
        """Wake the worker: a commit may have freed extents that stores wait for."""
        with self._changed:
            self._kicked = True
            self._changed.notify()

    def close(self) -> None:
        """Take nothing any more; wakes the worker."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def drain(self, *kinds: Literal["load", "store"]) -> list[Work]:
        """Everything of these kinds (none given: of both) that still waits, taken out."""
        with self._changed:
            rest: list[Work] = []
            for kind in kinds or ("load", "store"):
                rest.extend(self._queues[kind])
                self._queues[kind].clear()
            return rest
