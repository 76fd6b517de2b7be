"""Blocks for `penstock bench scale` over the network: made from tokens, written and read in spans."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator

from penstock.core.keys import BlockKey, KeyChain
from penstock.core.new_block import NewBlock, prefix_position
from penstock.core.spans import SPAN_BLOCKS_MAX, parts
from penstock.io.memory import aligned_buffer
from penstock.pool.api import Pool, PoolError

BLOCK_TOKENS = 64
MEMORY_BYTES = 256 << 20  # of all nodes together
SPANS_IN_FLIGHT = 4
TIMEOUT_S = 120.0


def prefix(root: BlockKey, tokens: list[int], size_bytes: int) -> list[NewBlock]:
    """The blocks of these tokens behind a root."""
    chain = KeyChain(root, BLOCK_TOKENS)
    keys = chain.extend(tokens)
    return [NewBlock(key, chain.parent_of(at), size_bytes, prefix_position(keys[0], at)) for at, key in enumerate(keys)]


def store(pool: Pool, blocks: list[NewBlock], size_bytes: int) -> None:
    """Write the blocks, without content. Raises PoolError, TimeoutError."""
    memory = aligned_buffer(SPANS_IN_FLIGHT * SPAN_BLOCKS_MAX * size_bytes)
    in_spans(blocks, memory, size_bytes, lambda span, views, done: pool.write_many(span, views, TIMEOUT_S, done))


def in_spans(
    blocks: list[NewBlock],
    memory: memoryview,
    size_bytes: int,
    begin: Callable[[list[NewBlock], list[memoryview], Callable[[list[PoolError | None]], None]], None],
) -> None:
    """Have SPANS_IN_FLIGHT spans under way until all have ended. Raises the first error."""
    free = threading.Semaphore(SPANS_IN_FLIGHT)
    failed: list[PoolError] = []

    def done(errors: list[PoolError | None]) -> None:
        failed.extend(error for error in errors if error is not None)
        free.release()

    views = [memory[at : at + size_bytes] for at in range(0, len(memory), size_bytes)]
    for number, span in enumerate(parts(blocks, size_bytes)):
        if not free.acquire(timeout=TIMEOUT_S):
            raise TimeoutError("a span did not end")
        at = number % SPANS_IN_FLIGHT * SPAN_BLOCKS_MAX
        begin(span, views[at : at + len(span)], done)
    for _ in range(SPANS_IN_FLIGHT):
        if not free.acquire(timeout=TIMEOUT_S):
            raise TimeoutError("a span did not end")
    if failed:
        raise failed[0]


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Keep Python's garbage collector from what is measured."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
