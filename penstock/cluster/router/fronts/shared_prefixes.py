"""The prefixes that all front processes of a router have seen: one table in memory that they share.

Each process reads and writes it without a lock. Two that write one place at once may lose a key, or keep one longer
than it is worth: an estimate (`core.cluster.seen_prefixes`) that is a little wrong, as after any eviction. A process
that dies at any point leaves the table as usable.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from penstock.core.cluster.seen_prefixes import KEYS_MAX, PrefixKey, PrefixKeys, SeenPrefixes

WAYS = 8  # places for a key; the one used longest ago makes room
KEY_BYTES = 16
HEADER_BYTES = 4096  # its first word is the clock: it advances with every use
_ROWS = KEYS_MAX // WAYS
TABLE_BYTES = HEADER_BYTES + 2 * 8 * WAYS * _ROWS


def make_table() -> int:
    """A file of memory for a table, to be passed to the processes that share it; the caller closes it. Raises
    OSError."""
    file = os.memfd_create("penstock-prefixes")
    os.ftruncate(file, TABLE_BYTES)
    return file


class SharedPrefixes(SeenPrefixes):
    """This process's view of the table in `file` (`make_table`), which stays the caller's."""

    def __init__(self, block_tokens: int, file: int) -> None:
        super().__init__(block_tokens)
        memory = mmap.mmap(file, TABLE_BYTES)
        self._clock = np.frombuffer(memory, np.uint64, 1)
        count = WAYS * _ROWS
        self._marks = np.frombuffer(memory, np.uint64, count, HEADER_BYTES).reshape(-1, WAYS)
        self._used = np.frombuffer(memory, np.uint64, count, HEADER_BYTES + 8 * count).reshape(-1, WAYS)

    def __len__(self) -> int:
        return int(np.count_nonzero(self._marks))

    def add(self, keys: PrefixKeys) -> None:
        """See `SeenPrefixes`."""
        for some in (keys.last, keys.segments, keys.first):
            if not some:
                continue
            rows, marks = _places(some)
            same = self._marks[rows] == marks[:, None]
            known, ways = same.any(axis=1), same.argmax(axis=1)
            stamps = self._stamps(len(some))
            self._used[rows[known], ways[known]] = stamps[known]
            for at in np.flatnonzero(~known)[::-1]:
                row = rows[at]
                way = int(self._used[row].argmin())
                self._marks[row, way] = marks[at]
                self._used[row, way] = stamps[at]

    def _known(self, keys: Sequence[PrefixKey]) -> int:
        if not keys:
            return 0
        rows, marks = _places(keys)
        same = self._marks[rows] == marks[:, None]
        known = same.any(axis=1)
        count = len(keys) if known.all() else int(known.argmin())
        if count:
            self._used[rows[:count], same[:count].argmax(axis=1)] = self._stamps(count)
        return count

    def _stamps(self, count: int) -> NDArray[np.uint64]:
        """Times of use, the first the latest: a prefix outlives what follows it."""
        clock = int(self._clock[0]) + count
        self._clock[0] = clock
        return np.uint64(clock) - np.arange(count, dtype=np.uint64)


def _places(keys: Sequence[PrefixKey]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """The row of each key, and what marks it there: never 0, which marks a free place."""
    words = np.frombuffer(b"".join(keys), np.uint64).reshape(-1, KEY_BYTES // 8)
    return (words[:, 0] % np.uint64(_ROWS)).astype(np.int64), words[:, 1] | np.uint64(1)
