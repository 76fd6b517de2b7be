"""Spans: blocks of one request on one route that travel together, as one decision, one message and one read.

Every block of a span keeps its own key, checksum and result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import TypeVar

from penstock.core.operations import Fetch

SPAN_BLOCKS_MAX = 64
SPAN_BYTES_MAX = 32 << 20
SPANS_PER_WINDOW = 8  # so that several devices behind a link read at once, and an urgent request gets in between

Item = TypeVar("Item")


def span_blocks(window_blocks: int, block_bytes: int) -> int:
    """The most blocks that one span on a link with this window may have; 1: blocks travel singly."""
    return max(1, min(SPAN_BLOCKS_MAX, SPAN_BYTES_MAX // block_bytes, window_blocks // SPANS_PER_WINDOW))


def spans_of(fetches: Iterable[Fetch], span_blocks: int) -> Iterator[list[Fetch]]:
    """Fetches that follow each other on one route, in spans of at most `span_blocks`."""
    for _, on_route in groupby(fetches, key=lambda fetch: fetch.route):
        while span := list(islice(on_route, span_blocks)):
            yield span


def parts(items: list[Item], size_bytes: int, bytes_max: int = SPAN_BYTES_MAX) -> list[list[Item]]:
    """The items, each of `size_bytes`, in parts that are spans of at most `bytes_max`; a larger item is a part of its
    own."""
    at_most = max(1, min(SPAN_BLOCKS_MAX, bytes_max // max(1, size_bytes)))
    return [items[at : at + at_most] for at in range(0, len(items), at_most)]
