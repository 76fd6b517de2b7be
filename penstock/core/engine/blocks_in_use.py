"""How many blocks of a waiting request are in use in L1, counted from the changes, without a look at all blocks."""

from __future__ import annotations

from penstock.core.engine.request import Counted, Request
from penstock.core.keys import BlockKey

CHANGES_MAX = 8192  # remembered; a request counted before these is counted anew, block by block


class BlocksInUse:
    """Blocks whose page cannot be evicted: pinned in L1, or on their way there with a page.

    The first count of a request looks at all its blocks, a later one at the changes since the last. So a change costs
    O(1) for each request that is counted after it, however many blocks that has.

    IN-USE-1  The latest count of a request plus the changes since then is the number of its blocks in use.
    Verification: tests/core/engine/test_blocks_in_use.py.
    """

    def __init__(self) -> None:
        self._keys: set[BlockKey] = set()
        self._changes: list[tuple[BlockKey, int]] = []  # the latest: key, 1 when its use began, -1 when it ended
        self._number = 0  # of changes since start

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._keys

    def add(self, key: BlockKey) -> None:
        """The block is in use from now on; it may be already."""
        if key not in self._keys:
            self._keys.add(key)
            self._note(key, 1)

    def discard(self, key: BlockKey) -> None:
        """The block is no longer in use; it need not have been."""
        if key in self._keys:
            self._keys.remove(key)
            self._note(key, -1)

    def count(self, request: Request) -> int:
        """How many of the blocks that the request may take from a cache are in use."""
        counted = request.counted
        if counted is None:
            counted = request.counted = Counted(frozenset(request.chain.keys[: request.hittable_blocks]))
        behind = self._number - counted.at_change
        if counted.at_change < 0 or behind > min(len(self._changes), len(counted.keys)):
            counted.in_use = len(counted.keys & self._keys)
        elif behind:
            for key, change in self._changes[-behind:]:
                if key in counted.keys:
                    counted.in_use += change
        counted.at_change = self._number
        return counted.in_use

    def _note(self, key: BlockKey, change: int) -> None:
        self._number += 1
        self._changes.append((key, change))
        if len(self._changes) > 2 * CHANGES_MAX:
            del self._changes[:CHANGES_MAX]

    def check_integrity(self, keys: set[BlockKey]) -> None:
        """Assert that those in use are `keys`."""
        assert self._keys == keys, "a block counts as in use that is not, or the other way round"
