"""Which blocks are read so often that a second copy pays: decaying counts of reads. No clock: the caller passes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from penstock.core.keys import KEY_BYTES, BlockKey

HALF_LIFE_S = 60.0
HOT_READS = 2.5  # reached by three reads within 33 s, and held by one read in 44 s
COUNTERS = 1 << 20  # in each of two rows; 24 MB together, of which only what is used takes memory
_ROWS = np.array([[0], [1]])


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
        self._heat = np.zeros((2, counters), np.float32)
        self._read_s = np.zeros((2, counters))

    def heat(self, key: BlockKey, now_s: float) -> float:
        """The heat of a block now."""
        return float(self._at(self._counters([key]), now_s).min())

    def read(self, keys: Sequence[BlockKey], now_s: float) -> list[int]:
        """Count a read of each block; returns the numbers of those that are hot."""
        if not keys:
            return []
        at = self._counters(keys)
        heat = self._at(at, now_s) + 1.0
        self._heat[_ROWS, at] = heat
        self._read_s[_ROWS, at] = now_s
        found: list[int] = np.flatnonzero(heat.min(axis=0) >= HOT_READS).tolist()
        return found

    def _counters(self, keys: Sequence[BlockKey]) -> NDArray[np.uint32]:
        """The counter of each block in each row, by bits of its key that do not say where it lies."""
        words = np.frombuffer(b"".join(keys), "<u4").reshape(-1, KEY_BYTES // 4)
        return np.stack((words[:, 2] >> 8, words[:, 3])) & np.uint32(self._last)

    def _at(self, counters: NDArray[np.uint32], now_s: float) -> NDArray[np.float64]:
        ages_s = np.maximum(0.0, now_s - self._read_s[_ROWS, counters])
        found: NDArray[np.float64] = self._heat[_ROWS, counters] * np.exp2(-ages_s / HALF_LIFE_S)
        return found
