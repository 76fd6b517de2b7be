"""How much of a node's time the messages of peers may take that move no block, or are refused, by source address.

MSG-1  All addresses together have a share of the time of one thread, in equal parts those that use it at present.
MSG-2  An address that is more than BURST_S ahead of its part waits before its next message: each of its connections for
       itself, one after the other, so that many of them wake up no oftener than one. No pause is longer than
       PAUSE_S_MAX: an honest peer behind that address is late, and does not take the node for dead.
MSG-3  A connection that ends counts too, with what its peer did not take or had wrong; and a new one waits as those do
       that its address has.
Why: threads that are always busy with short calls get Python's interpreter lock back before a thread that waits for it
has woken up. Blocks are not counted: they are the node's work, and moved without the lock.
Verification: tests/pool/net/test_message_budget.py; tests/pool/net/attacks.py measures it.
"""

from __future__ import annotations

SHARE = 0.4
BURST_S = 0.005
PAUSE_S_MAX = 0.25
LOOK_S = 0.001  # addresses that have paid are looked for no oftener


class MessageBudget:
    """Not thread-safe: the caller has a lock, and the clock."""

    def __init__(self, share: float = SHARE) -> None:
        self._share = share
        self._free_s: dict[str, float] = {}  # by address: when what it used is paid for
        self._looked_s = 0.0

    def used(self, source: str, cost_s: float, now_s: float) -> float:
        """A message of this address took `cost_s`; returns for how long its connection reads no further one."""
        if now_s >= self._looked_s + LOOK_S:
            self._looked_s = now_s
            self._free_s = {other: free_s for other, free_s in self._free_s.items() if free_s > now_s}
        free_s = max(self._free_s.get(source, now_s), now_s)
        users = len(self._free_s) + (source not in self._free_s)
        free_s += cost_s * users / self._share
        self._free_s[source] = free_s
        return min(max(0.0, free_s - now_s - BURST_S), PAUSE_S_MAX)
