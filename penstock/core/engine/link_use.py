"""What is in flight on one link, and for how long each operation alone kept it busy."""

from __future__ import annotations


class LinkUse:
    """Operations in flight on one link, and when it last finished one."""

    __slots__ = ("in_flight", "last_done_s")

    def __init__(self) -> None:
        self.in_flight = 0
        self.last_done_s = 0.0

    def finished(self, issued_s: float, now: float) -> float:
        """One operation ended; returns for how long it alone kept the link busy, in seconds."""
        self.in_flight -= 1
        busy_s = now - max(issued_s, self.last_done_s)
        self.last_done_s = now
        return busy_s
