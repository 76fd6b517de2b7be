"""Batches do what as many single calls do; and what they cost in counted work, in objects and in bytes."""

from __future__ import annotations

import gc
import random
import tracemalloc

import pytest

from penstock.core.new_block import NewBlock, tenant_tag
from penstock.core.pool.block_rows import USES_COUNTED_MAX
from penstock.core.pool.quota import TenantQuotas
from penstock.pool.block import Block
from penstock.pool.local.table import Table
from penstock.pool.members.stored_rows import packed
from tests.call_counts import all_calls
from tests.pool.helpers import ROOT, key_of, new_block

PAGE = 4096


def prefix(name: object, length: int, tenant: str = "", pages: int = 1, cost: float = 1e-5) -> list[NewBlock]:
    keys = [key_of((name, at)) for at in range(length)]
    parents = [ROOT, *keys]
    return [new_block(key, parents[at], pages * PAGE, at, tenant, cost) for at, key in enumerate(keys)]


def one_by_one(table: Table, news: list[NewBlock], at_once: int = 1) -> list[bytes]:
    gone = []
    for at in range(0, len(news), at_once):
        reserved = [table.reserve(new) for new in news[at : at + at_once]]
        for block, old in reserved:
            assert block is not None
            table.commit(block)
            gone += [one.key for one in old]
    return gone


def together(table: Table, news: list[NewBlock], at_once: int = 64) -> list[bytes]:
    gone = []
    for at in range(0, len(news), at_once):
        blocks, old = table.reserve_many(news[at : at + at_once])
        assert table.commit_many([block for block in blocks if block is not None]) == []
        assert None not in blocks
        gone += [key for _, key in old]
    return gone


def places(table: Table) -> dict[bytes, tuple[int, float, int, bytes]]:
    """Member, worth, uses and account of every present block."""
    found = {}
    for member in range(len(table.members)):
        for block in table.blocks_on(member):
            found[block.key] = (member, table.value(block.key), block.uses, block.account)
    return found


@pytest.mark.parametrize("default", [None, 40 * PAGE])
def test_lookups_of_many_keys_note_what_lookups_of_each_note(default: int | None) -> None:
    generator = random.Random(3)
    tables = [Table([(0, 200 * PAGE)] * 2, [2.0, 1.0], TenantQuotas(default_bytes=default)) for _ in range(2)]
    names = [prefix(n, 12, f"t{n % 9}", cost=1e-6 * n) for n in range(20)]
    for table in tables:
        for news in names:
            one_by_one(table, news)
    for step in range(90):
        keys = [new.key for new in generator.choice(names)[: generator.randrange(1, 13)]]
        if step % 2:  # each is the parent of the next, twice, and of some only some are there
            keys += [new.key for new in generator.choice(names)]
        keys += [*[key_of(("missing", step))] * (step % 3 == 0), *generator.choices(keys, k=step % 5 % 3)]
        for table in tables:
            table.set_healthy(1, step % 7 != 0)
        found = tables[0].lookup_many(b"".join(keys))
        sizes, members = [], []
        for key in keys:
            block = tables[1].find(key)
            sizes.append(block.size_bytes if block is not None else 0)
            members.append(block.member if block is not None else 0)
            if block is not None:
                tables[1].touch(block)
        assert (found.sizes.tolist(), found.members.tolist()) == (sizes, members)
        for table in tables:
            table.check_integrity()
        assert places(tables[0]) == places(tables[1])


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_writes_of_many_blocks_evict_what_writes_of_each_evict(members: int, seed: int) -> None:
    """Full members, blocks of one size, prefixes that were used at different times."""
    generator = random.Random(seed)
    tables = [Table([(0, 240 // members * PAGE)] * members, [1.0] * members) for _ in range(2)]
    for number in range(40):
        news = prefix(number, generator.randrange(1, 50), cost=generator.choice((0.0, 1e-6, 1e-5)))
        used = prefix(generator.randrange(number + 1), generator.randrange(1, 40))
        for table in tables:
            one_by_one(table, news)
            table.lookup_many(b"".join(new.key for new in used))
    news = prefix("last", 32)
    gone = [one_by_one(tables[0], news, 32), together(tables[1], news, 32)]
    for table in tables:
        table.check_integrity()
    assert gone[0] == gone[1], "the least worth first, leaves before roots"
    assert len(gone[0]) == 32 and places(tables[0]) == places(tables[1])


@pytest.mark.parametrize("kind", ["sizes", "quotas", "pinned", "fenced"])
def test_writes_of_many_blocks_find_room_where_it_is_not_simple(kind: str) -> None:
    generator = random.Random(5)
    quotas = TenantQuotas({tenant_tag("a"): 50 * PAGE}, 60 * PAGE) if kind == "quotas" else TenantQuotas()
    table = Table([(0, 200 * PAGE)] * 2, [1.0, 2.0], quotas)
    pinned: list[Block] = []
    for number in range(60):
        tenant = f"{'ab'[number % 2]}" if kind == "quotas" else ""
        pages = generator.randrange(1, 5) if kind == "sizes" else 1
        news = prefix(number, 24, tenant, pages)
        if kind == "fenced":
            table.set_healthy(0, number % 5 != 0)
        blocks, gone = table.reserve_many(news)
        assert not {key for _, key in gone} & {block.key for block in pinned}
        assert all(table.find(key) is None for _, key in gone)
        table.commit_many([block for block in blocks if block is not None])
        table.check_integrity()
        assert sum(block is not None for block in blocks) == 24
        if kind == "pinned" and number % 3 == 0:
            block = table.find(news[-1].key)
            assert block is not None
            table.pin(block)
            pinned.append(block)
    for block in pinned:
        table.unpin(block)
    table.check_integrity()


def test_many_are_dropped_at_once_but_for_those_that_are_read() -> None:
    table = Table([(0, 100 * PAGE)], [1.0])
    news = prefix("a", 40)
    together(table, news)
    read = table.find(news[7].key)
    assert read is not None
    table.pin(read)
    keys = [new.key for new in news]
    gone = table.evict_many(b"".join([*keys[:20], *keys[:3], key_of("missing")]))
    assert gone == [(0, key) for at, key in enumerate(keys[:20]) if at != 7]
    table.check_integrity()
    assert len(table) == 21 and table.find(keys[7]) is read
    table.unpin(read)
    table.check_integrity()


def test_uses_are_handed_over_once_and_only_of_blocks_that_are_there() -> None:
    table = Table([(0, 100 * PAGE)] * 2, [1.0, 1.0])
    table.note_durable(0)
    news = prefix("a", 40)
    together(table, news)
    keys = [new.key for new in news]
    for _ in range(3):
        table.lookup_many(b"".join(keys))
    table.evict_many(keys[0])
    first, rest = table.take_uses(0, 10), table.take_uses(0, 1000)
    assert len(first) == 10 and table.take_uses(0, 10) == [] == table.take_uses(1, 10)
    there = {block.key: (table.value(block.key), block.uses) for block in table.blocks_on(0)}
    assert {key: (value, uses) for key, value, uses in (*first, *rest)} == there
    assert all(uses == 4 for _, uses in there.values())


def test_uses_are_counted_up_to_a_limit() -> None:
    table = Table([(0, 10 * PAGE)], [1.0])
    block = Block(key_of("a"), ROOT, 0, 0, PAGE, 0)
    block.uses = USES_COUNTED_MAX + 7
    assert table.restore(0, [(block, 1.0)]) == []
    table.lookup_many(block.key)
    (now,) = table.blocks_on(0)
    table.touch(now)
    assert now.uses == USES_COUNTED_MAX


def test_a_batch_costs_few_calls_per_block() -> None:
    blocks = 8192
    table = Table([(0, blocks // 2 * PAGE)] * 2, [1.0, 1.0])
    for number in range(5):
        together(table, prefix(number, 2048), 2048)
    keys = b"".join(new.key for new in prefix(4, 2048))
    assert all_calls(lambda: table.lookup_many(keys)) < 400, "a lookup of 2,048 keys"
    assert all_calls(lambda: table.lookup_many(keys[: 64 * 16])) < 105, "of 64 keys: what a node of many is asked for"
    news = prefix("new", 2048)
    assert all_calls(lambda: together(table, news, 256)) < 45 * 2048, "a store with eviction, per block"
    single = prefix("single", 256)
    assert all_calls(lambda: one_by_one(table, single)) < 300 * 256
    assert all_calls(lambda: table.evict_many(keys)) < 90 * 2048


def stored(count: int, chain: bool) -> list[tuple[Block, float]]:
    """Blocks as a durable table has them, in an order that is not that of their worth, of which many are equal."""
    generator, keys = random.Random(3), [key_of(("stored", at)) for at in range(count)]
    parents = [ROOT, *keys] if chain else [key_of(("absent", at)) for at in range(count)]
    each = enumerate(zip(keys, parents, strict=False))
    return [(Block(key, parent, 0, at * PAGE, PAGE, 0), float(generator.randrange(9))) for at, (key, parent) in each]


def test_a_restored_table_evicts_by_worth_and_then_in_the_order_of_the_rows() -> None:
    table, rows = Table([(0, 60 * PAGE)], [1.0]), stored(60, chain=False)
    outside = Block(key_of("outside"), ROOT, 0, 99 * PAGE, PAGE, 0), 0.0
    twice = rows[40][0], 8.0  # the row that is worth less is the first
    assert [one.key for one in table.restore(0, [*rows[:20], outside, *rows[20:], twice])] == [
        outside[0].key, rows[40][0].key,
    ]  # fmt: skip
    table.check_integrity()
    gone = [old.key for at in range(60) for old in table.reserve(new_block(key_of(("new", at)), ROOT, PAGE, at))[1]]
    assert gone == [block.key for block, _ in sorted(rows, key=lambda one: one[1])]


def test_restoring_copies_no_rows() -> None:
    blocks = 20_000
    rows, table = packed(stored(blocks, chain=True)), Table([(0, blocks * PAGE)], [1.0])
    tracemalloc.start()
    try:
        assert table.restore_many(0, rows) == []
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 250 * blocks and len(table) == blocks  # a row has 136 bytes


@pytest.mark.slow
def test_blocks_are_no_objects_and_take_few_bytes() -> None:
    gc.collect()
    before = len(gc.get_objects())
    table = Table([(0, 16384 * PAGE)] * 2, [1.0, 1.0])
    for number in range(20):
        together(table, prefix(number, 2048), 2048)
    gc.collect()
    assert len(table) == 32768 and len(gc.get_objects()) - before < 1000
    assert table.bytes_per_row <= 100


def test_a_table_that_is_filled_many_times_over_does_not_grow() -> None:
    table = Table([(0, 2048 * PAGE)] * 2, [1.0, 1.0])
    sizes = []
    for number in range(60):
        together(table, prefix(number, 512, f"tenant {number}"), 256)
        table.lookup_many(b"".join(new.key for new in prefix(number // 2, 512)))
        sizes.append(table.rows_used)
    table.check_integrity()
    assert len(table) == 4096 and sizes[-1] == sizes[20] <= 4096 + 2 * 512
