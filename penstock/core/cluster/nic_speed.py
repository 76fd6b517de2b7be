"""The speed of each host's storage NIC that reads are placed by, estimated from measurements of all NICs."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort

UNKNOWN_BYTES_PER_S = 1e9  # of storage NICs before any measurement
SLOW = 0.2  # a storage NIC below this part of the fastest counts with its measured speed


class NicSpeed:
    """One host's storage NIC, as it counts now."""

    __slots__ = ("_all", "own_tokens_per_s", "seen_bytes_per_s")

    def __init__(self, everybody: StorageSpeeds) -> None:
        self._all = everybody
        self.seen_bytes_per_s = 0.0  # 0: nothing yet
        self.own_tokens_per_s = 0.0

    @property
    def tokens_per_s(self) -> float:
        """In tokens of KV."""
        everybody = self._all
        slow = 0 < self.seen_bytes_per_s < everybody.slow_bytes_per_s
        return self.own_tokens_per_s if slow else everybody.common_tokens_per_s


class StorageSpeeds:
    """The storage NICs of all hosts. A NIC much slower than the others counts with its measured speed. The measured
    speed of a NIC with little load is unreliable, so all others count with their median. An update of one costs
    O(log hosts): the speeds of the others are derived when they are read."""

    def __init__(self) -> None:
        self.slow_bytes_per_s = 0.0
        self.common_tokens_per_s = 0.0
        self._hosts: dict[str, NicSpeed] = {}
        self._seen: list[float] = []  # of all hosts, in order

    def see(self, host: str, bytes_per_s: float, block_tokens: int, block_bytes: int) -> NicSpeed:
        """What was seen of a host's NIC (0: nothing yet); the geometry of blocks is the same for all hosts."""
        nic = self._hosts.get(host)
        if nic is None:
            nic = self._hosts[host] = NicSpeed(self)
        else:
            self._drop(nic)
        nic.seen_bytes_per_s = bytes_per_s
        nic.own_tokens_per_s = max(1.0, bytes_per_s * block_tokens / block_bytes)
        seen = self._seen
        insort(seen, bytes_per_s)
        self.slow_bytes_per_s = SLOW * seen[-1]
        self.common_tokens_per_s = max(1.0, self._median() * block_tokens / block_bytes)
        return nic

    def forget(self, host: str) -> None:
        """A host is gone; the speeds of the others are updated with the next measurement."""
        nic = self._hosts.pop(host, None)
        if nic is not None:
            self._drop(nic)

    def _drop(self, nic: NicSpeed) -> None:
        del self._seen[bisect_left(self._seen, nic.seen_bytes_per_s)]

    def _median(self) -> float:
        """Of the NICs of which something was seen, without the slow ones."""
        seen = self._seen
        first = max(bisect_left(seen, self.slow_bytes_per_s), bisect_right(seen, 0.0))
        middle, odd = divmod(first + len(seen), 2)
        if first == len(seen):
            return UNKNOWN_BYTES_PER_S
        return seen[middle] if odd else (seen[middle - 1] + seen[middle]) / 2
