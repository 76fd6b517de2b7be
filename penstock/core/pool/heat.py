"""Which blocks are read so often that a second copy pays: decaying counts of reads. No clock: the caller passes it."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

from penstock.core.keys import BlockKey

HALF_LIFE_S = 60.0
HOT_READS = 2.5  # reached by three reads within 33 s, and held by one read in 44 s
COUNTERS = 1 << 20  # in each of two rows; 24 MB together


class ReadHeat:
    """Reads of blocks, in a count-min sketch of two rows (Cormode and Muthukrishnan, 2005). Not thread-safe.

    HEAT-1  Statement: A block's heat is the sum of its reads, each halved for every HALF_LIFE_S since, or more where
            other blocks share both of its counters. It is hot from HOT_READS on.
    HEAT-2  Statement: Memory does not grow with the blocks that are read; of blocks that are read once, while 10^5 are
            within a half-life, less than one in 1,000 is hot.
    Verification: tests/core/pool/test_heat.py.
    """

    def __init__(self, counters: int = COUNTERS) -> None:
        """`counters`: of each row, a power of two."""
        self._last = counters - 1
        self._heat = array("f", bytes(4)) * (2 * counters)  # the second row behind the first one
        self._read_s = array("d", bytes(8)) * (2 * counters)

    def heat(self, key: BlockKey, now_s: float) -> float:
        """The heat of a block now."""
        return min(self._at(counter, now_s) for counter in self._counters(key))

    def read(self, keys: Sequence[BlockKey], now_s: float) -> list[int]:
        """Count a read of each block; returns the numbers of those that are hot."""
        return [number for number, key in enumerate(keys) if self._count(key, now_s) >= HOT_READS]

    def _count(self, key: BlockKey, now_s: float) -> float:
        """Count a read; returns the block's heat."""
        least = float("inf")
        for counter in self._counters(key):
            heat = self._heat[counter] = self._at(counter, now_s) + 1.0
            self._read_s[counter] = now_s
            least = min(least, heat)
        return least

    def _counters(self, key: BlockKey) -> tuple[int, int]:
        """The counter of a block in each row, by bits of its key that do not say where it lies."""
        first, second = int.from_bytes(key[9:12], "little"), int.from_bytes(key[12:], "little")
        return first & self._last, self._last + 1 + (second & self._last)

    def _at(self, counter: int, now_s: float) -> float:
        half_lives = max(0.0, now_s - self._read_s[counter]) / HALF_LIFE_S
        return self._heat[counter] * math.pow(0.5, half_lives)
