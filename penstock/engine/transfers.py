"""Reads and writes that the pool has not ended: each ends by its deadline for the core, whatever its device does.

A local device that hangs keeps the memory it was given. Its slot gets other memory then, so that what comes late lands
where nobody looks; the old memory goes when the device lets go of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

GRACE_S = 0.5  # the pool ends what it can by the deadline itself
CHECK_S = 0.25

End = Callable[[str | None], None]  # None, or the reason for which the transfer failed


class Transfers:
    """`replace(slot)` gives a slot other memory. `end_late` is the control thread's, the rest anybody's."""

    def __init__(self, replace: Callable[[int], None]) -> None:
        self._replace = replace
        self._lock = threading.Lock()
        self._open: dict[int, tuple[float, int, End]] = {}  # op -> when it is given up, slot, what to tell
        self._next_check_s = 0.0

    def begin(self, op_id: int, slot: int, timeout_s: float, end: End) -> End:
        """What the pool has to call; it reaches `end` unless the transfer was given up before."""
        with self._lock:
            self._open[op_id] = (time.monotonic() + timeout_s + GRACE_S, slot, end)

        def ended(reason: str | None) -> None:
            with self._lock:
                mine = self._open.pop(op_id, None)
            if mine is not None:
                end(reason)

        return ended

    def end_late(self) -> None:
        """Give up what is past its deadline; looks every `CHECK_S`."""
        now_s = time.monotonic()
        if now_s < self._next_check_s:
            return
        self._next_check_s = now_s + CHECK_S
        with self._lock:
            late = {op_id: item for op_id, item in self._open.items() if item[0] <= now_s}
            for op_id in late:
                del self._open[op_id]
        for _, slot, end in late.values():
            self._replace(slot)
            end("deadline")
