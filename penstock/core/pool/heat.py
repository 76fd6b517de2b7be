"""Which blocks are read so often that a second copy pays: decaying counts of reads. No clock: the caller passes it."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

from penstock.core.keys import BlockKey

HALF_LIFE_S = 60.0
HOT_READS = 2.5  # reached by three reads within 33 s, and held by one read in 44 s
COUNTED_MAX = 1 << 16  # blocks


class ReadHeat:
    """Reads of the blocks that were read last. Not thread-safe.

    HEAT-1  A block's heat is the sum of its reads, each halved for every HALF_LIFE_S since; it is hot from HOT_READS
            on.
    HEAT-2  At most `capacity` blocks are counted; those whose last read is longest ago are forgotten.
    Verification: tests/core/pool/test_heat.py.
    """

    def __init__(self, capacity: int = COUNTED_MAX) -> None:
        self._capacity = capacity
        self._counts: OrderedDict[BlockKey, tuple[float, float]] = OrderedDict()  # heat, and when

    def __len__(self) -> int:
        return len(self._counts)

    def heat(self, key: BlockKey, now_s: float) -> float:
        """The heat of a block now; 0 for one that is not counted."""
        count, since_s = self._counts.get(key, (0.0, now_s))
        return count * math.pow(0.5, max(0.0, now_s - since_s) / HALF_LIFE_S)

    def read(self, keys: Sequence[BlockKey], now_s: float) -> list[int]:
        """Count a read of each block; returns the numbers of those that are hot."""
        hot = []
        for at, key in enumerate(keys):
            count = self.heat(key, now_s) + 1.0
            self._counts[key] = count, now_s
            self._counts.move_to_end(key)
            if count >= HOT_READS:
                hot.append(at)
        while len(self._counts) > self._capacity:
            self._counts.popitem(last=False)
        return hot
