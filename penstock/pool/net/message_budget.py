"""Limits the CPU time that peers' messages may use when they move no block or are refused, by source address.

MSG-1  Statement: All addresses together may use a share of one thread's time, divided equally among those that use it
       at present.
MSG-2  Statement: An address that has used BURST_S more than its part waits before its next message. Its connections
       wait one after the other, so that many of them wake up no more often than one. No pause is longer than
       PAUSE_S_MAX: an honest peer behind that address is late, but does not consider the node dead.
MSG-3  Statement: A connection that ends is charged too, for answers that its peer did not receive and for bad messages.
       A new connection waits like the others of its address. Fault: threads that are always busy with short calls get
       Python's interpreter lock back before a thread that waits for it has woken up. Blocks are not charged: moving
       them is the node's purpose, and done without the lock.
Verification: tests/pool/net/test_message_budget.py; tests/pool/net/attacks.py measures it.
"""

from __future__ import annotations

SHARE = 0.4
BURST_S = 0.005
PAUSE_S_MAX = 0.25
LOOK_S = 0.001  # minimum interval of the search for addresses whose time is paid


class MessageBudget:
    """The accounts of all addresses. Not thread-safe: the caller holds a lock, and passes the time."""

    def __init__(self, share: float = SHARE) -> None:
        self._share = share
        self._free_s: dict[str, float] = {}  # address -> when the time that it used is paid
        self._looked_s = 0.0

    def used(self, source: str, cost_s: float, now_s: float) -> float:
        """Charge `cost_s` to an address; returns the seconds for which its connection must not read a further
        message."""
        if now_s >= self._looked_s + LOOK_S:
            self._looked_s = now_s
            self._free_s = {other: free_s for other, free_s in self._free_s.items() if free_s > now_s}
        free_s = max(self._free_s.get(source, now_s), now_s)
        users = len(self._free_s) + (source not in self._free_s)
        free_s += cost_s * users / self._share
        self._free_s[source] = free_s
        return min(max(0.0, free_s - now_s - BURST_S), PAUSE_S_MAX)
