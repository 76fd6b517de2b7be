"""Reads and writes under way in the pool: for the core each ends by its deadline, even if the device hangs.

A local device that hangs still uses its memory. The slot gets other memory then, so that late bytes are written where
they do no harm; the old memory is freed when the device ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

GRACE_S = 0.5  # the pool itself ends most transfers by the deadline
CHECK_S = 0.25

End = Callable[[str | None], None]  # None, or the reason why the transfer failed
EndSpan = Callable[[Sequence[str | None]], None]


class Transfers:
    """`replace(slot)` gives a slot other memory. `end_late` is for the control thread; all else for any thread."""

    def __init__(self, replace: Callable[[int], None]) -> None:
        self._replace = replace
        self._lock = threading.Lock()
        self._open: dict[int, tuple[float, Sequence[int], EndSpan]] = {}  # operation -> (given up at, slots, callback)
        self._next_check_s = 0.0

    def begin(self, op_id: int, slot: int, timeout_s: float, end: End) -> End:
        """Register a transfer; returns the callback for the pool, which calls `end` unless the transfer was given up
        before."""
        ended = self.begin_span(op_id, (slot,), timeout_s, lambda reasons: end(reasons[0]))
        return lambda reason: ended((reason,))

    def begin_span(self, op_id: int, slots: Sequence[int], timeout_s: float, end: EndSpan) -> EndSpan:
        """As `begin`, for transfers that end together; `op_id` is that of the first."""
        with self._lock:
            self._open[op_id] = (time.monotonic() + timeout_s + GRACE_S, slots, end)

        def ended(reasons: Sequence[str | None]) -> None:
            with self._lock:
                mine = self._open.pop(op_id, None)
            if mine is not None:
                end(reasons)

        return ended

    def end_late(self) -> None:
        """Give up transfers past their deadline; checked every `CHECK_S`."""
        now_s = time.monotonic()
        if now_s < self._next_check_s:
            return
        self._next_check_s = now_s + CHECK_S
        with self._lock:
            late = {op_id: item for op_id, item in self._open.items() if item[0] <= now_s}
            for op_id in late:
                del self._open[op_id]
        for _, slots, end in late.values():
            for slot in slots:
                self._replace(slot)
            end(("deadline",) * len(slots))
