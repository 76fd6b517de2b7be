"""Whether blocks are looked for on nodes that do not own them: for some time after any change, then now and then."""

from __future__ import annotations

WATCH_S = 600.0
WATCH_LOOKUPS = 64
EVERY_LOOKUPS = 64


class StrayWatch:
    """Blocks lie beside their owner when they were written before the nodes or their weights changed, by an earlier
    version, or while the owner was down or refused them. Not thread-safe; the caller passes the time.

    STRAY-1  Statement: After `changed`, and after every find, all nodes are asked for what the owners do not have, for
             WATCH_S and at least WATCH_LOOKUPS lookups. Later every EVERY_LOOKUPS-th lookup asks them.
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

    def asks_all(self, now_s: float) -> bool:
        """Whether this lookup, whose hits ended early, asks all nodes; counts it."""
        self._lookups += 1
        if self._left or now_s < self._until_s:
            self._left = max(0, self._left - 1)
            return True
        return self._lookups % EVERY_LOOKUPS == 0
