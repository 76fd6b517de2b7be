"""Tries a fenced member again: one read of its first page, after growing pauses."""

from __future__ import annotations

from penstock.io.memory import aligned_buffer
from penstock.pool.api import PoolError
from penstock.pool.block import Block
from penstock.pool.members.header import HEADER_BYTES
from penstock.pool.members.work import Work

FIRST_PAUSE_S = 1.0
PAUSE_S_MAX = 60.0
GOOD_S = 60.0  # after so long without a fault, pauses start from the first one again
ANSWER_S = 1.0  # a slower answer does not count
NEVER_S = 3600.0


class Probe:
    """For the member's worker only. `answered` is set after a good answer."""

    def __init__(self, page: bytes) -> None:
        """`page` is the expected content of the first page."""
        self.answered = False
        self._page = page
        self._pause_s = FIRST_PAUSE_S
        self._next_s = 0.0
        self._good_since_s = float("-inf")
        self._begin_s = 0.0
        self._buffer = aligned_buffer(HEADER_BYTES)
        self._under_way: Work | None = None

    def fenced(self, now_s: float) -> None:
        """The member is fenced: try it after a pause."""
        if now_s - self._good_since_s > GOOD_S:
            self._pause_s = FIRST_PAUSE_S
        self.answered = False
        self._next_s = now_s + self._pause_s

    def unfenced(self, now_s: float) -> None:
        """The member takes operations again."""
        self.answered = False
        self._good_since_s = now_s

    def due(self, now_s: float) -> bool:
        """Whether to try the member now."""
        return self._under_way is None and now_s >= self._next_s

    def owns(self, work: Work) -> bool:
        """Whether this operation belongs to the probe."""
        return work is self._under_way

    def work(self, now_s: float) -> Work:
        """The read to submit now."""
        self._begin_s = now_s
        self._pause_s = min(self._pause_s * 2, PAUSE_S_MAX)
        self._next_s = now_s + self._pause_s
        self._buffer[:] = bytes(HEADER_BYTES)
        block = Block(b"", b"", 0, 0, HEADER_BYTES, 0)
        self._under_way = Work("load", block, self._buffer, now_s + NEVER_S, self._ended)
        return self._under_way

    def _ended(self, work: Work, error: PoolError | None) -> None:
        self._under_way = None
        self.answered = error is None and bytes(self._buffer) == self._page
