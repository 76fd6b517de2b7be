"""The pool wrapper that meters an engine's storage NIC."""

from __future__ import annotations

import queue
from collections.abc import Sequence

import pytest

from penstock.cluster.handoff.link_meter import LinkMeter, MeteredPool
from penstock.core.keys import BlockKey
from penstock.io.memory import aligned_buffer
from penstock.pool.api import Done, Pool, PoolError, ReadCheck
from penstock.pool.setup.open import open_local_pool
from penstock.pool.wrapped import WrappedPool
from tests.pool.helpers import WAIT_S, key_of, write
from tests.pool.span_pool import SpanPool

SIZE = 4096


class CountedMeter(LinkMeter):
    def __init__(self) -> None:
        super().__init__()
        self.moved: list[int] = []

    def end(self, moved_bytes: int) -> None:
        self.moved.append(moved_bytes)
        super().end(moved_bytes)


class Plain(WrappedPool):
    """Changes nothing."""


class Single(WrappedPool):
    """Changes how a block is read, and says nothing of spans."""

    def __init__(self, inner: Pool) -> None:
        super().__init__(inner)
        self.reads = 0

    def read(
        self,
        key: BlockKey,
        size_bytes: int,
        into: memoryview,
        timeout_s: float,
        done: Done,
        check: ReadCheck | None = None,
    ) -> None:
        self.reads += 1
        super().read(key, size_bytes, into, timeout_s, done, check)


@pytest.fixture
def counted() -> SpanPool:
    pool = SpanPool(open_local_pool((1 << 20,), []))
    for number in range(3):
        assert write(pool, key_of(number), size_bytes=SIZE) == "ok"
    return pool


def read_all(pool: Pool, keys: Sequence[BlockKey]) -> list[str | None]:
    found: queue.SimpleQueue[list[PoolError | None]] = queue.SimpleQueue()
    intos = [aligned_buffer(SIZE) for _ in keys]
    pool.read_many(keys, SIZE, intos, WAIT_S, found.put)
    return [error.reason if error else None for error in found.get(timeout=WAIT_S)]


def test_a_span_stays_whole_and_is_metered_as_one_transfer(counted: SpanPool) -> None:
    meter = CountedMeter()
    pool = MeteredPool(counted, meter)
    keys = [key_of(0), key_of("absent"), key_of(2)]
    assert read_all(pool, keys) == [None, "missing", None]
    assert counted.reads == [3] and meter.moved == [2 * SIZE]
    pool.close(5.0)


def test_a_wrapper_that_changes_nothing_passes_spans_on_and_one_that_changes_reads_sees_each(
    counted: SpanPool,
) -> None:
    keys = [key_of(number) for number in range(3)]
    assert read_all(Plain(counted), keys) == [None] * 3 and counted.reads == [3]
    single = Single(counted)
    assert read_all(single, keys) == [None] * 3
    assert counted.reads == [3] and single.reads == 3
    counted.close(5.0)
