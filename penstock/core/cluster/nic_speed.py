"""Which speed each host's storage NIC counts for when reads are placed, given what was seen of all of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

UNKNOWN_BYTES_PER_S = 1e9  # of storage NICs of which nobody knows anything
SLOW = 0.2  # a storage NIC below this part of the fastest is taken for what it gives


def storage_speeds(seen_bytes_per_s: Mapping[str, float]) -> dict[str, float]:
    """Bytes per second of each host's NIC, given what was seen of it (0: nothing yet): that, where it is far below the
    others. What is seen of a NIC with little to do says little of its speed, so all others count as their median."""
    slow = SLOW * max(seen_bytes_per_s.values(), default=0.0)
    usual = [seen for seen in seen_bytes_per_s.values() if seen and seen >= slow]
    common = statistics.median(usual) if usual else UNKNOWN_BYTES_PER_S
    return {host: seen if 0 < seen < slow else common for host, seen in seen_bytes_per_s.items()}
