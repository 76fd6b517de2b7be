"""Which speed a host's storage NIC counts for when reads are placed, given what was seen of all of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

UNKNOWN_BYTES_PER_S = 1e9  # of storage NICs of which nobody knows anything
SLOW = 0.2  # a storage NIC below this part of the fastest is taken for what it gives


def storage_bytes_per_s(host: str, seen_bytes_per_s: Mapping[str, float]) -> float:
    """As the host's NIC was seen, where that is far below the others. What is seen of a NIC with little to do says
    little of its speed, so all others, those not seen yet (0) too, count as their median."""
    slow = SLOW * max(seen_bytes_per_s.values(), default=0.0)
    usual = [seen for seen in seen_bytes_per_s.values() if seen and seen >= slow]
    own = seen_bytes_per_s.get(host, 0.0)
    return own if 0 < own < slow else statistics.median(usual) if usual else UNKNOWN_BYTES_PER_S
