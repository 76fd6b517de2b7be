"""Deadlines of many requests on one thread. A cancelled deadline drops the reference to its action."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

from penstock.process.guarded_thread import GuardedThread
from penstock.process.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

WAIT_S_MAX = 3600.0  # of one wait: a condition refuses very large numbers
SWEEP = 64


class Deadline:
    """An action that is called at its time, unless it is cancelled before."""

    __slots__ = ("_action", "_owner", "at_s")

    def __init__(self, owner: Deadlines, at_s: float, action: Callable[[], None]) -> None:
        self.at_s = at_s
        self._owner = owner
        self._action: Callable[[], None] | None = action

    def cancel(self) -> None:
        """Drop the action; no effect when it was called or cancelled. Any thread."""
        if self.take() is not None:
            self._owner.cancelled()

    def take(self) -> Callable[[], None] | None:
        """Take the action out; None when it was called, cancelled or taken already."""
        action, self._action = self._action, None
        return action

    @property
    def ended(self) -> bool:
        """Whether it was called or cancelled."""
        return self._action is None


class Deadlines:
    """Runs from construction to `close`. Any thread may call; actions run on a thread of this class and must not block
    for long. An exception in one is logged, and does not stop the others."""

    def __init__(self, name: str) -> None:
        self._changed = threading.Condition()
        self._heap: list[tuple[float, int, Deadline]] = []
        self._serial = itertools.count()
        self._cancelled = 0  # cancelled ones in the heap, approximately
        self._closed = False
        self._thread = GuardedThread(name, self._watch, restarts=True)
        self._thread.start()

    def __len__(self) -> int:
        """Deadlines in the heap, including cancelled ones that were not removed yet."""
        return len(self._heap)

    def after(self, delay_s: float, action: Callable[[], None]) -> Deadline:
        """Call `action` in `delay_s` seconds; at once for a negative delay or NaN."""
        deadline = Deadline(self, time.monotonic() + (delay_s if delay_s > 0 else 0.0), action)
        with self._changed:
            heapq.heappush(self._heap, (deadline.at_s, next(self._serial), deadline))
            if self._heap[0][2] is deadline:
                self._changed.notify()
        return deadline

    def cancelled(self) -> None:
        """Note that one was cancelled; cancelled ones are removed once they are the majority."""
        with self._changed:
            self._cancelled += 1
            if self._cancelled > SWEEP + len(self._heap) // 2:
                self._heap = [entry for entry in self._heap if not entry[2].ended]
                heapq.heapify(self._heap)
                self._cancelled = 0

    def close(self, timeout_s: float) -> None:
        """Call no further action."""
        with self._changed:
            self._closed = True
            self._heap.clear()
            self._changed.notify()
        self._thread.join(timeout_s)

    def _watch(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                wait_s = self._heap[0][0] - time.monotonic() if self._heap else None
                if wait_s is None or wait_s > 0:
                    self._changed.wait(None if wait_s is None else min(wait_s, WAIT_S_MAX))
                    continue
                deadline = heapq.heappop(self._heap)[2]
                self._cancelled = max(0, self._cancelled - deadline.ended)
            action = deadline.take()
            if action is None:
                continue
            try:
                action()
            except Exception as error:  # noqa: BLE001 (of one action; the other deadlines must still be met)
                rare.exception("deadline", "the action of a deadline failed: %r", error)
            del action, deadline
