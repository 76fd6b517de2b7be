"""Chains of rows by hash (`core.pool.columns`), many rows at a time.

A view of a column must not outlive the call that made it: a column that grows has no views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from penstock.core.pool.block_rows import LEAVING
from penstock.core.pool.columns import HashChains

SPLIT_AT_ONCE = 1024
Rows = NDArray[np.int64]
HashesOf = Callable[[Rows], NDArray[np.uint64]]


def views(chains: HashChains) -> Iterator[NDArray[np.int32]]:
    """The heads of the chains, and the links of the rows."""
    return (np.frombuffer(column.memory, np.int32) for column in chains.columns)


def buckets(chains: HashChains, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The bucket of each hash."""
    at = hashes & np.uint64(chains.mask)
    return np.where(at < chains.buckets, at, at & np.uint64(chains.mask >> 1)).astype(np.int64)


def stable_order(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """`argsort` that leaves equal values as they are: a stable sort takes four times as long, and few are equal."""
    order = np.argsort(values)
    found = values[order]
    return order if (found[1:] > found[:-1]).all() else np.argsort(values, kind="stable")


def _sorted(values: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of at most 31 bits in order, and which they were; equal ones as they are. Sorts words of both, which
    takes a sixth of the time of a stable `argsort`."""
    words = values.astype(np.uint64) << np.uint64(32) | np.arange(len(values), dtype=np.uint64)
    words.sort()
    return (words >> np.uint64(32)).astype(np.int64), (words & np.uint64(0xFFFFFFFF)).astype(np.int64)


def chain_many(chains: HashChains, rows: Rows, hashes: NDArray[np.uint64], hashes_of: HashesOf) -> None:
    """Add rows that are not in a chain. `hashes_of` gives the hashes of rows that are."""
    if not len(rows):
        return
    if not chains.count:
        chains.make_buckets(len(rows))
    count = chains.count + len(rows)
    if count > chains.buckets:
        moved = _split_many(chains, max(count - chains.buckets, min(SPLIT_AT_ONCE, chains.buckets)))
        rows, hashes = np.concatenate((rows, moved)), np.concatenate((hashes, hashes_of(moved)))
    at = buckets(chains, hashes)
    at, order = _sorted(at)
    rows = rows[order]
    heads, links = views(chains)
    first = np.ones(len(at), bool)
    first[1:] = at[1:] != at[:-1]
    follows = np.empty(len(at), np.int32)
    follows[:-1] = rows[1:] + 1
    last = np.append(first[1:], True)
    follows[last] = heads[at[last]]
    links[rows] = follows
    heads[at[first]] = rows[first] + 1
    chains.count = count


def _split_many(chains: HashChains, more: int) -> Rows:
    """Add buckets; returns the rows whose buckets may have changed, taken out of their chains. Raises OSError without
    memory; nothing has changed then."""
    chains.make_room(chains.buckets + more)
    heads, links = views(chains)
    taken = [np.zeros(0, np.int64)]
    while more:
        old, some = chains.add_buckets(more)
        link, more = heads[old : old + some].copy(), more - some
        heads[old : old + some] = 0
        while len(link := link[link > 0]):
            taken.append(link.astype(np.int64) - 1)
            link = links[link - 1]
    return np.concatenate(taken)


def unchain_many(chains: HashChains, hashes: NDArray[np.uint64], flags: NDArray[np.uint8]) -> None:
    """Remove the rows with these hashes from their chains: those whose flags say LEAVING."""
    heads, links = views(chains)

    def without(follows: NDArray[np.int32]) -> NDArray[np.int32]:
        while (gone := (follows > 0) & (flags[follows - 1] & LEAVING > 0)).any():
            follows[gone] = links[follows[gone] - 1]
        return follows

    at = np.unique(buckets(chains, hashes))
    link = heads[at] = without(heads[at])
    while len(link := link[link > 0]):
        follows = links[link - 1] = without(links[link - 1])
        link = follows
    chains.count -= len(hashes)
