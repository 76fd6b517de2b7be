"""Which nodes are asked for blocks that their owners do not have: all, those that had them before a change, or none."""

from __future__ import annotations

from typing import Literal

WATCH_S = 600.0
WATCH_LOOKUPS = 64
EVERY_LOOKUPS = 64

Asked = Literal["all", "former", "none"]


class StrayWatch:
    """Blocks lie beside their owner when they were written before the nodes or their weights changed, by an earlier
    version, or while the owner was down or refused them. Not thread-safe; the caller passes the time.

    STRAY-1  Statement: After a start, `changed`, and every find, all nodes are asked for what the owners do not have,
             in WATCH_LOOKUPS lookups; then, until WATCH_S have passed, the nodes that former maps name. Every
             EVERY_LOOKUPS-th lookup asks all. So a fleet whose nodes come and go is not asked as a whole all the time.
    Verification: tests/core/pool/test_runs.py.
    """

    def __init__(self, now_s: float) -> None:
        self._until_s = 0.0
        self._left = 0
        self._lookups = 0
        self.changed(now_s)

    def changed(self, now_s: float) -> None:
        """The nodes, their weights or their states changed, or a block was found beside its owner."""
        self._until_s = now_s + WATCH_S
        self._left = WATCH_LOOKUPS

    def asks(self, now_s: float) -> Asked:
        """Which nodes this lookup, whose hits ended early, asks; counts it."""
        self._lookups += 1
        if self._left:
            self._left -= 1
            return "all"
        if self._lookups % EVERY_LOOKUPS == 0:
            return "all"
        return "former" if now_s < self._until_s else "none"
