"""Pages of requests that generate: what a step reads of them, counted, and when they are read anew."""

from __future__ import annotations

import random
from typing import Any

import pytest

from penstock.engine.page_tables import TABLES_MAX, PageTables
from penstock.engine.runner import Chunk

PAGES = 1 << 20
BLOCK = 16


class Counted(list[int]):
    """A list that counts how many of its items were read."""

    def __init__(self, items: Any = ()) -> None:
        super().__init__(items)
        self.read = 0

    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        self.read += len(found) if isinstance(at, slice) else 1
        return found

    def __iter__(self) -> Any:
        self.read += len(self)
        return super().__iter__()


def step(tables: PageTables, request: str, start: int, pages: list[int]) -> list[int]:
    """What the runner learns for one token at `start`."""
    needed = -(-(start + 1) // BLOCK)
    found: list[int] = tables.of(Chunk(request, [7], start, pages), needed, PAGES).tolist()
    return found


def test_a_step_reads_what_is_new_however_many_pages_there_are() -> None:
    reads = []
    for count in (200, 2000):
        tables, pages = PageTables(), Counted(range(5, 5 + count))
        start = count * BLOCK - 3
        assert step(tables, "r", start, pages) == list(range(5, 5 + count))
        assert pages.read == count, "all of them for the first token"
        pages.read = 0
        for at in range(start + 1, start + 1 + 4 * BLOCK):
            if at % BLOCK == 0:
                pages.append(PAGES - at)
            assert len(step(tables, "r", at, pages)) == at // BLOCK + 1
        reads.append(pages.read)
    assert reads == [4, 4], "one for each page that 64 tokens began"


def test_pages_are_read_anew_when_the_request_starts_over() -> None:
    tables, pages = PageTables(), [3, 4, 5]
    assert step(tables, "r", 40, pages) == [3, 4, 5]
    assert step(tables, "r", 41, [3, 9, 5]) == [3, 9, 5], "another list: the request was admitted again"
    pages = [3, 9, 6]
    assert step(tables, "r", 42, pages) == [3, 9, 6]
    pages[1] = 8
    assert step(tables, "r", 42, pages) == [3, 8, 6], "the same token once more: its first run came to nothing"
    pages[0] = 2
    assert step(tables, "r", 20, pages) == [2, 8]
    assert step(tables, "other", 21, pages) == [2, 8], "a list is not the request's name"
    assert step(tables, "r", 21, pages) == [2, 8]


def test_only_new_pages_are_checked_and_a_wrong_one_leaves_nothing() -> None:
    tables, pages = PageTables(), [1, 2]
    step(tables, "r", 31, pages)
    for wrong in (-1, PAGES):
        with pytest.raises(ValueError, match=f"request r: pages must be 0 to {PAGES - 1}"):
            step(tables, "r", 32, [*pages, wrong])
    pages.append(-1)
    with pytest.raises(ValueError, match="pages must be"):
        step(tables, "r", 32, pages)
    pages[2] = 7
    assert step(tables, "r", 32, pages) == [1, 2, 7]


def test_tables_equal_the_lists_in_random_histories_and_are_bounded() -> None:
    dice, tables = random.Random(5), PageTables()
    lists: dict[str, tuple[int, list[int]]] = {}
    for _ in range(3000):
        request = str(dice.randrange(8))
        start, pages = lists.get(request, (dice.randrange(200), []))
        if not pages or dice.random() < 0.05:  # preempted: another list
            start = max(0, start - dice.randrange(3))
            pages = [dice.randrange(PAGES) for _ in range(-(-(start + 1) // BLOCK))]
        while len(pages) * BLOCK <= start:
            pages.append(dice.randrange(PAGES))
        assert step(tables, request, start, pages) == pages[: start // BLOCK + 1]
        lists[request] = (start + 1, pages)
    for number in range(TABLES_MAX + 8):
        step(tables, f"n{number}", 0, [number])
    again = Counted([1])
    for _ in range(2):
        step(tables, "0", 0, again)
    assert again.read == 2
