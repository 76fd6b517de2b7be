"""Writes blocks of noise into a pool, a few at a time, as the initial content for experiments."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np

from penstock.core.layout import staging_bytes
from penstock.core.new_block import NewBlock
from penstock.io.memory import aligned_buffer
from penstock.pool.api import Pool, PoolError

SLOTS = 16


def fill_pool(pool: Pool, blocks: Iterable[NewBlock], block_bytes: int, timeout_s: float = 60.0) -> None:
    """Write them. Raises the first PoolError after all writes have ended, TimeoutError after `timeout_s` without
    progress."""
    padded = staging_bytes(block_bytes)
    memory = aligned_buffer(padded * SLOTS)
    memory[:] = np.random.default_rng(0).bytes(len(memory))
    pool.register(memory)
    free = threading.Semaphore(SLOTS)
    errors: list[PoolError] = []

    def done(error: PoolError | None) -> None:
        if error is not None:
            errors.append(error)
        free.release()

    def take() -> None:
        if not free.acquire(timeout=timeout_s):
            raise TimeoutError(f"the pool took no block for {timeout_s:g} s")

    for count, block in enumerate(blocks):
        take()
        pool.write(block, memory[(count % SLOTS) * padded : (count % SLOTS + 1) * padded], timeout_s, done)
    for _ in range(SLOTS):
        take()
    if errors:
        raise errors[0]
