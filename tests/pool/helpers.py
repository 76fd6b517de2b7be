"""What the tests of pool and transport share: keys, blocks of known bytes, and calls that wait."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from penstock.core.keys import BlockKey
from penstock.core.layout import staging_bytes
from penstock.core.new_block import NewBlock, tenant_tag
from penstock.io.memory import aligned_buffer
from penstock.pool.api import Pool, PoolError

ROOT = b"r" * 16
STORE_S = 60.0  # a commit of a process of low priority can wait 10 s for each of its syncs behind the I/O of others
WAIT_S = 75.0


def key_of(name: object) -> BlockKey:
    return hashlib.blake2b(str(name).encode(), digest_size=16).digest()


def block_bytes(key: BlockKey, size_bytes: int) -> bytes:
    """Bytes that only this key's block has."""
    return hashlib.shake_128(key).digest(min(size_bytes, 4096)).ljust(size_bytes, key[:1])


def staged(key: BlockKey, size_bytes: int) -> memoryview:
    buffer = aligned_buffer(staging_bytes(size_bytes))
    buffer[:size_bytes] = block_bytes(key, size_bytes)
    return buffer


class Outcome:
    """A `done` that can be waited for, and that fails when it is called twice."""

    def __init__(self) -> None:
        self._ends: queue.SimpleQueue[PoolError | None] = queue.SimpleQueue()

    def __call__(self, error: PoolError | None) -> None:
        self._ends.put(error)

    def get(self, timeout_s: float = WAIT_S) -> PoolError | None:
        return self._ends.get(timeout=timeout_s)

    def reason(self, timeout_s: float = WAIT_S) -> str:
        """ "ok" or the reason of the error."""
        error = self.get(timeout_s)
        return error.reason if error else "ok"

    def pending(self) -> bool:
        return self._ends.empty()


def new_block(
    key: BlockKey,
    parent: BlockKey = ROOT,
    size_bytes: int = 4096,
    position: int | None = None,
    tenant: str = "",
    rebuild_s: float = 0.0,
) -> NewBlock:
    """A block; without a position it lies anywhere in the spread."""
    at = int.from_bytes(key[-4:], "little") if position is None else position
    return NewBlock(key, parent, size_bytes, at, tenant_tag(tenant), rebuild_s)


def write(
    pool: Pool,
    key: BlockKey,
    parent: BlockKey = ROOT,
    size_bytes: int = 4096,
    timeout_s: float = STORE_S,
    position: int | None = None,
    tenant: str = "",
    rebuild_s: float = 0.0,
) -> str:
    outcome = Outcome()
    block = new_block(key, parent, size_bytes, position, tenant, rebuild_s)
    pool.write(block, staged(key, size_bytes), timeout_s, outcome)
    return outcome.reason()


def read(pool: Pool, key: BlockKey, size_bytes: int = 4096, timeout_s: float = STORE_S) -> str:
    """ "ok" only when the right bytes came."""
    outcome, into = Outcome(), aligned_buffer(staging_bytes(size_bytes))
    pool.read(key, size_bytes, into, timeout_s, outcome)
    reason = outcome.reason()
    if reason == "ok":
        assert bytes(into[:size_bytes]) == block_bytes(key, size_bytes), "wrong bytes were served"
    return reason


def chain(name: object, length: int) -> list[tuple[BlockKey, BlockKey]]:
    """(key, parent) of a prefix of `length` blocks."""
    keys = [key_of((name, i)) for i in range(length)]
    return list(zip(keys, [ROOT, *keys], strict=False))


def member(stat: Any, name: str) -> Any:
    return next(m for m in stat.members if m.name == name)


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true in time"
        threading.Event().wait(0.002)
