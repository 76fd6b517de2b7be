"""How fast a member reads while it is busy: bytes and time with at least two reads in the device's hands."""

from __future__ import annotations

BUSY_READS = 2


class ReadMeter:
    """Fed by the member's worker; read from any thread."""

    def __init__(self) -> None:
        self._reads = 0
        self._bytes = 0
        self._busy_s = 0.0
        self._since_s = 0.0  # while busy: when that began

    def observed(self, now_s: float) -> tuple[int, float]:
        """Bytes and seconds so far."""
        busy, since_s, total_s = self._reads >= BUSY_READS, self._since_s, self._busy_s
        return self._bytes, total_s + max(0.0, now_s - since_s) if busy else total_s

    @property
    def reads(self) -> int:
        """Under way now."""
        return self._reads

    def started(self, now_s: float) -> None:
        """One more read went to the device."""
        self._reads += 1
        if self._reads == BUSY_READS:
            self._since_s = now_s

    def ended(self, reads: int, moved_bytes: int, now_s: float) -> None:
        """`reads` came back together, with `moved_bytes`."""
        if self._reads >= BUSY_READS:
            self._bytes += moved_bytes
            if self._reads - reads < BUSY_READS:
                self._busy_s += now_s - self._since_s
        self._reads -= reads
