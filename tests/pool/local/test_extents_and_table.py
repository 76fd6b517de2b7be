"""Extents never overlap, and the table makes room without losing more than it must."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.pool.local.extents import ExtentAllocator
from penstock.pool.local.table import Table
from tests.pool.helpers import ROOT, key_of, new_block

PAGE = 4096


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=80))
def test_allocator_against_a_bitmap(steps: list[tuple[bool, int]]) -> None:
    allocator = ExtentAllocator(PAGE, 65 * PAGE)
    used: set[int] = set()
    extents: list[tuple[int, int]] = []
    for take, pages in steps:
        if take:
            offset = allocator.take(pages * PAGE)
            if offset is None:
                longest = run = 0
                for page in range(1, 66):
                    run = 0 if page in used or page == 65 else run + 1
                    longest = max(longest, run)
                assert longest < pages
                continue
            fresh = set(range(offset // PAGE, offset // PAGE + pages))
            assert not fresh & used and min(fresh) >= 1 and max(fresh) < 65
            used |= fresh
            extents.append((offset, pages))
        elif extents:
            offset, length = extents.pop(pages % len(extents))
            allocator.give(offset, length * PAGE)
            used -= set(range(offset // PAGE, offset // PAGE + length))
        allocator.check_integrity()
        assert allocator.free_bytes == (64 - len(used)) * PAGE


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 63), max_size=40), st.integers(1, 5), st.integers(1, 40))
def test_many_extents_are_those_that_one_after_the_other_are(pages: list[int], length: int, count: int) -> None:
    """Of a range with holes, and with what is left after them."""
    allocators = [ExtentAllocator(0, 64 * PAGE) for _ in range(2)]
    used = sorted(set(pages))
    for allocator in allocators:
        allocator.take_listed([(page * PAGE, PAGE) for page in used])
    together, one_by_one = allocators
    found = together.take_many(length * PAGE, count)
    alone = [one_by_one.take(length * PAGE) for _ in range(count)]
    assert sorted(found) == sorted(offset for offset in alone if offset is not None)
    together.check_integrity()


def test_giving_twice_or_outside_is_refused() -> None:
    allocator = ExtentAllocator(0, 16 * PAGE)
    offset = allocator.take(4 * PAGE)
    assert offset is not None
    allocator.give(offset, 4 * PAGE)
    for at, length in ((offset, 4 * PAGE), (12 * PAGE, 8 * PAGE)):
        with pytest.raises(ValueError, match="free already or outside"):
            allocator.give(at, length)
    with pytest.raises(ValueError, match="positive multiple"):
        allocator.take(100)
    allocator.check_integrity()


def test_a_list_of_extents_is_taken_but_for_what_is_malformed_outside_or_overlaps() -> None:
    listed = [
        (6 * PAGE, 10 * PAGE),
        (4 * PAGE, 2 * PAGE),
        (5 * PAGE, PAGE),
        (0, PAGE),
        (15 * PAGE, 2 * PAGE),
        (PAGE + 1, PAGE),
        (2 * PAGE, 0),
        (2 * PAGE, PAGE),
    ]
    allocator = ExtentAllocator(PAGE, 16 * PAGE)
    assert allocator.take_listed(listed) == [True, True, False, False, False, False, False, True]
    allocator.check_integrity()
    assert allocator.free_bytes == 2 * PAGE and allocator.holes == 2
    assert [allocator.take(PAGE), allocator.take(PAGE), allocator.take(PAGE)] == [PAGE, 3 * PAGE, None]


def fill(table: Table, names: range, pages: int) -> None:
    for name in names:
        block, _ = table.reserve(new_block(key_of(name), size_bytes=pages * PAGE))
        assert block is not None
        table.commit(block)
        table.check_integrity()


def test_a_large_block_among_small_ones_costs_few_of_them() -> None:
    """Small blocks used in an order that frees scattered pages: room for a large one comes from neighbours."""
    table = Table([(0, 64 * PAGE)], [1.0])
    fill(table, range(64), 1)
    for name in (name for step in range(7) for name in range(step, 64, 7)):
        block = table.find(key_of(name))
        assert block is not None
        table.touch(block)
    large, gone = table.reserve(new_block(key_of("large"), size_bytes=8 * PAGE))
    assert large is not None and len(gone) <= 3 * 8
    table.check_integrity()


def test_pinned_neighbours_are_never_moved_out() -> None:
    table = Table([(0, 16 * PAGE)], [1.0])
    fill(table, range(16), 1)
    blocks = [table.find(key_of(name)) for name in range(16)]
    for block in blocks[::4]:
        assert block is not None
        table.pin(block)
    assert table.reserve(new_block(key_of("too large"), size_bytes=4 * PAGE))[0] is None
    fits, _ = table.reserve(new_block(key_of("fits"), size_bytes=3 * PAGE))
    assert fits is not None
    table.check_integrity()
    assert all(table.find(block.key) is block for block in blocks[::4] if block)


def test_a_full_member_overflows_to_the_others_before_anything_is_evicted() -> None:
    table = Table([(0, 4 * PAGE), (0, 32 * PAGE)], [100.0, 1.0])
    parent, members = ROOT, []
    for i in range(36):
        block, gone = table.reserve(new_block(key_of(i), parent, PAGE, i))
        assert block is not None and not gone
        table.commit(block)
        members.append(block.member)
        parent = block.key
    assert members.count(0) == 4 and members.count(1) == 32
    block, gone = table.reserve(new_block(key_of("more"), parent, PAGE))
    assert block is not None and [old.key for old in gone] == [key_of(35)]


def test_a_prefix_is_spread_by_weight_even_when_two_are_written_in_turns() -> None:
    table = Table([(0, 4096 * PAGE)] * 2, [2.0, 1.0])
    owners: dict[str, list[int]] = {"a": [], "b": []}
    parents = {"a": ROOT, "b": ROOT}
    for i in range(60):
        for name in ("a", "b") if i % 3 else ("b", "a"):
            block, _ = table.reserve(new_block(key_of((name, i)), parents[name], PAGE, i))
            assert block is not None
            table.commit(block)
            owners[name].append(block.member)
            parents[name] = block.key
    for name in ("a", "b"):
        for start in range(0, 50):
            assert 5 <= owners[name][start : start + 9].count(0) <= 7
