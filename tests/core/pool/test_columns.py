"""Packed columns and chains of rows by hash, against plain sets."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from penstock.core.pool.block_rows import LEAVING
from penstock.core.pool.columns import BUCKETS_MIN, Column, HashChains, mixed
from penstock.pool.local.chain_batches import chain_many, unchain_many

ROWS = 4096


def test_a_column_keeps_what_was_written_when_it_grows_and_is_0_elsewhere() -> None:
    column = Column("i", 100, 2)
    column.items[7], column.items[199] = 5, -1
    for rows in (1000, 300_000):
        column.grow(rows)
        assert len(column.items) == 2 * rows
        assert (column.items[7], column.items[199], column.items[2 * rows - 1]) == (5, -1, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("aabrBR"), st.integers(0, ROWS - 1)), max_size=60), st.integers(1, 7))
def test_chains_hold_what_was_added_one_by_one_or_many_at_a_time(steps: list[tuple[str, int]], spread: int) -> None:
    """Few different hashes make long chains."""
    hashes = [row // spread * 2654435761 % (1 << 32) for row in range(ROWS)]
    chains = HashChains(ROWS, hashes.__getitem__)

    def hashes_of(rows: NDArray[np.int64]) -> NDArray[np.uint64]:
        return np.array([hashes[row] for row in rows.tolist()], np.uint64)

    held: set[int] = set()
    for kind, row in steps:
        some = [one for one in range(row, min(ROWS, row + 100))]
        if kind == "a" and row not in held:
            chains.add(row, hashes[row])
            held.add(row)
        elif kind == "b":
            new = np.array([one for one in some if one not in held], np.int64)
            chain_many(chains, new, hashes_of(new), hashes_of)
            held |= set(new.tolist())
        elif kind == "r" and held:
            gone = min(held)
            chains.remove(gone, hashes[gone])
            held.discard(gone)
        elif kind in "BR":
            out = [one for one in some if one in held][:: 1 if kind == "B" else 2]
            flags = np.zeros(ROWS, np.uint8)
            flags[out] = LEAVING
            unchain_many(chains, np.array([hashes[one] for one in out], np.uint64), flags)
            held -= set(out)
        chains.check_integrity(held)
        assert chains.buckets >= max(BUCKETS_MIN, chains.count)


def test_one_more_row_splits_one_chain_and_none_is_ever_hashed_twice_at_once() -> None:
    asked = 0

    def hash_of(row: int) -> int:
        nonlocal asked
        asked += 1
        return mixed(row, row, 12345)

    chains = HashChains(1 << 16, hash_of)
    most = 0
    for row in range(1 << 16):
        before = asked
        chains.add(row, mixed(row, row, 12345))
        most = max(most, asked - before)
    for row in range(1 << 16):
        chains.remove(row, mixed(row, row, 12345))
    assert most < 16 and asked < 3 << 16, "no call rehashes more than a chain"
