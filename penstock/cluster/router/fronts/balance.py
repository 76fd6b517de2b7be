"""How many connections each front has, in memory that they share: the one with the fewest accepts the next.

A number is one word, which its front writes and the others read; the placer's process writes that of a front that has
ended. A number that is wrong for a moment costs balance, nothing else.
"""

from __future__ import annotations

import mmap
import os

BYTES = 4096
_GONE = 2**63  # it accepts nothing


def make_balance() -> int:
    """A file of memory, to be passed to the fronts; the caller closes it. Raises OSError."""
    file = os.memfd_create("penstock-fronts")
    os.ftruncate(file, BYTES)
    return file


class FrontBalance:
    """One front's view of `file` (`make_balance`), which stays the caller's. See `server.acceptor.Balance`."""

    def __init__(self, file: int, slot: int, fronts: int) -> None:
        self._slot = slot
        self._counts = memoryview(mmap.mmap(file, BYTES)).cast("Q")[:fronts]

    def have(self, connections: int | None) -> None:
        """This front has so many connections; None: it accepts no more."""
        self._counts[self._slot] = _GONE if connections is None else connections

    def is_mine(self) -> bool:
        """Whether no other front has fewer."""
        return self._counts[self._slot] <= min(self._counts)
