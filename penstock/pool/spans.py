"""Several blocks with one completion: results by block, gathered from parts that end on any thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial

from penstock.core.keys import BlockKey
from penstock.core.new_block import NewBlock
from penstock.pool.api import Done, DoneMany, Pool, PoolError, ReadCheck
from penstock.process.guarded_thread import count_failure

log = logging.getLogger(__name__)

PartEnded = Callable[[Sequence[PoolError | None]], None]


def call_done_many(done: DoneMany, errors: list[PoolError | None]) -> None:
    """Call `done`; an exception in it is logged and counted, and does not propagate."""
    try:
        done(errors)
    except Exception:
        count_failure("penstock-done-callback")
        log.exception("a done callback of the pool raised")


class Gather:
    """Calls `done` with the results of `blocks` blocks once all parts have ended. Any thread may end a part."""

    def __init__(self, blocks: int, done: DoneMany) -> None:
        self._errors: list[PoolError | None] = [None] * blocks
        self._left = blocks
        self._lock = threading.Lock()
        self._done = done

    def part(self, indexes: Sequence[int]) -> PartEnded:
        """The callback for the part that has the blocks at these indexes, with their results in order; each block is in
        one part, and each part ends once."""
        return partial(self.end, indexes)

    def one(self, index: int) -> Done:
        """The callback for a block on its own."""
        return lambda error: self.end((index,), (error,))

    def end(self, indexes: Sequence[int], errors: Sequence[PoolError | None]) -> None:
        """The part that has the blocks at these indexes has ended, with these results in order."""
        for index, error in zip(indexes, errors, strict=True):
            self._errors[index] = error
        with self._lock:
            self._left -= len(indexes)
            last = not self._left
        if last:
            call_done_many(self._done, self._errors)


def read_each(
    pool: Pool,
    keys: Sequence[BlockKey],
    size_bytes: int,
    intos: Sequence[memoryview],
    timeout_s: float,
    done: DoneMany,
    checks: Sequence[ReadCheck | None] | None = None,
) -> None:
    """`Pool.read_many` by single reads."""
    gather = Gather(len(keys), done)
    for index, (key, into) in enumerate(zip(keys, intos, strict=True)):
        check = checks[index] if checks is not None else None
        pool.read(key, size_bytes, into, timeout_s, gather.one(index), check)


def write_each(
    pool: Pool, blocks: Sequence[NewBlock], datas: Sequence[memoryview], timeout_s: float, done: DoneMany
) -> None:
    """`Pool.write_many` by single writes."""
    gather = Gather(len(blocks), done)
    for index, (block, data) in enumerate(zip(blocks, datas, strict=True)):
        pool.write(block, data, timeout_s, gather.one(index))


def all_failed(done: DoneMany, blocks: int) -> Done:
    """A `Done` that reports one error for all blocks of a span."""
    return partial(_fail_all, done, blocks)


def _fail_all(done: DoneMany, blocks: int, error: PoolError | None) -> None:
    done([error] * blocks)
