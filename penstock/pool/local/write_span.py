"""Several blocks that are written together: their stores become present at once, and their results are one answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

from penstock.pool.api import Done, DoneMany, PoolError
from penstock.pool.block import Block
from penstock.pool.members.work import Work
from penstock.pool.spans import Gather

Stored = list[tuple[int, Block, PoolError | None]]  # number in the span, block, error of its store


class WriteSpan:
    """Counts the results of `count` blocks; `done` gets them once, in order, on the thread of the last one. `stored` is
    called when all stores that were begun have ended. Any thread may call."""

    def __init__(self, count: int, done: DoneMany, stored: Callable[[WriteSpan, Stored], None]) -> None:
        self._lock = threading.Lock()
        self._results = Gather(count, done)
        self._on_stored = stored
        self._storing = 1  # one more until all have begun
        self._stored: Stored = []

    def end_of(self, number: int) -> Done:
        """The `done` of one block."""
        return self._results.one(number)

    def end(self, numbers: Sequence[int], errors: Sequence[PoolError | None]) -> None:
        """These blocks have ended."""
        self._results.end(numbers, errors)

    def finish_of(self, number: int) -> Callable[[Work, PoolError | None], None]:
        """The `finish` of the store of one block, which begins now."""
        with self._lock:
            self._storing += 1
        return partial(self._finish, number)

    def stored(self, some: Stored) -> None:
        """Stores that were done at once have ended; before `begun`."""
        with self._lock:
            self._stored += some

    def begun(self) -> None:
        """No further store begins."""
        self._count_store(None)

    def _finish(self, number: int, work: Work, error: PoolError | None) -> None:
        self._count_store((number, work.block, error))

    def _count_store(self, one: tuple[int, Block, PoolError | None] | None) -> None:
        with self._lock:
            if one is not None:
                self._stored.append(one)
            self._storing -= 1
            if self._storing or not self._stored:
                return
            stored = sorted(self._stored, key=lambda one: one[0])
        self._on_stored(self, stored)
