"""The table under random histories: writes, reads, quotas, members that fence, come back, drain, go and come."""

from __future__ import annotations

import random
from statistics import fmean

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.core.new_block import NewBlock, tenant_tag
from penstock.core.pool.quota import TenantQuotas
from penstock.pool.block import Block
from penstock.pool.local.table import Table
from tests.pool.helpers import ROOT, key_of, new_block

PAGE = 4096
NAMES = st.integers(0, 39)
MEMBERS_MAX = 5
TENANTS = ("", "a", "b", "c")


class Histories(RuleBasedStateMachine):
    """40 keys in prefixes of 8, of 1 to 5 pages, on members of 24 to 40 pages: room is short all the time."""

    @initialize(quota=st.sampled_from([None, 10 * PAGE, 30 * PAGE]))
    def begin(self, quota: int | None) -> None:
        quotas = TenantQuotas({tenant_tag("a"): 12 * PAGE}, quota)
        self.table = Table([(PAGE, 33 * PAGE), (0, 24 * PAGE)], [2.0, 1.0], quotas)
        self.present: dict[bytes, Block] = {}
        self.writing: list[Block] = []
        self.readers: list[Block] = []
        self.moves: list[tuple[Block, Block]] = []

    def left(self, blocks: list[Block]) -> None:
        """Blocks that made way: nobody held them, and nobody finds them."""
        for block in blocks:
            assert block not in self.readers and all(block is not source for source, _ in self.moves)
            assert self.present.pop(block.key) is block and self.table.find(block.key) is None

    @rule(name=NAMES, pages=st.integers(1, 5), without=st.sets(st.integers(0, 1), max_size=1))
    def reserve(self, name: int, pages: int, without: set[int]) -> None:
        key = key_of(name)
        if self.table.find(key) is not None or self.table.being_written(key):
            return
        tenant = TENANTS[name // 8 % len(TENANTS)]
        parent = key_of(name - 1) if name % 8 else ROOT
        block, gone = self.table.reserve(new_block(key, parent, pages * PAGE - 7, name, tenant, 1e-6 * name), without)
        self.left(gone)
        if block is not None:
            state = self.table.members[block.member]
            assert block.member not in without and state.healthy and not state.draining and not state.gone
            self.writing.append(block)

    @rule(names=st.lists(NAMES, max_size=12, unique=True), pages=st.integers(1, 3), without=st.sets(st.integers(0, 1)))
    def store_many(self, names: list[int], pages: int, without: set[int]) -> None:
        """Those that find room are committed together."""
        new = [name for name in names if self.table.find(key_of(name)) is None]
        new = [name for name in new if not self.table.being_written(key_of(name))]
        parents = [key_of(name - 1) if name % 8 else ROOT for name in new]
        tenant = TENANTS[pages]
        blocks, gone = self.table.reserve_many(
            [new_block(key_of(n), p, pages * PAGE, n, tenant) for n, p in zip(new, parents, strict=True)], without
        )
        for member, key in gone:
            left = self.present.pop(key)
            assert left.member == member and left not in self.readers and left.row < 0
        reserved = [block for block in blocks if block is not None]
        assert all(block.member not in without for block in reserved)
        for old in self.table.commit_many(reserved):
            assert self.present.pop(old.key) is old
        self.present |= {block.key: block for block in reserved}

    @rule(names=st.lists(NAMES, max_size=12))
    def look_many(self, names: list[int]) -> None:
        keys = [key_of(name) for name in names]
        blocks = [self.table.find(key) for key in keys]
        found = self.table.lookup_many(b"".join(keys))
        assert found.sizes.tolist() == [block.size_bytes if block else 0 for block in blocks]
        assert all(block is None or block.member == at for block, at in zip(blocks, found.members, strict=True))

    @rule(names=st.lists(NAMES, max_size=6))
    def drop_many(self, names: list[int]) -> None:
        gone = self.table.evict_many(b"".join(key_of(name) for name in names))
        for member, key in gone:
            left = self.present.pop(key)
            assert left.member == member and left not in self.readers
        pinned = {block.key for block in self.readers} | {source.key for source, _ in self.moves}
        assert all(key_of(name) in pinned or key_of(name) not in self.present for name in names)

    @precondition(lambda self: self.writing)
    @rule(data=st.data(), ok=st.sampled_from([True, True, True, False]))
    def written(self, data: st.DataObject, ok: bool) -> None:
        block = self.writing.pop(data.draw(st.integers(0, len(self.writing) - 1)))
        if not ok:
            self.table.abandon(block)
            return
        old = self.table.commit(block)
        assert old is self.present.get(block.key)
        self.present[block.key] = block

    @rule(name=NAMES, hold=st.booleans())
    def look(self, name: int, hold: bool) -> None:
        block = self.table.find(key_of(name))
        if block is not None:
            uses = block.uses
            self.table.touch(block)
            assert block.uses == uses + 1
            if hold:
                self.table.pin(block)
                self.readers.append(block)

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.table.unpin(self.readers.pop(data.draw(st.integers(0, len(self.readers) - 1))))

    @rule(name=NAMES)
    def drop(self, name: int) -> None:
        block = self.present.pop(key_of(name), None)
        if block is not None:
            self.table.drop(block)
            assert self.table.find(block.key) is None

    @rule(member=st.integers(0, MEMBERS_MAX - 1), healthy=st.booleans())
    def fence(self, member: int, healthy: bool) -> None:
        if member < len(self.table.members) and not self.table.members[member].gone:
            self.table.set_healthy(member, healthy)

    @rule(pages=st.integers(24, 40), weight=st.floats(0.1, 4.0))
    def come(self, pages: int, weight: float) -> None:
        states = self.table.members
        if len(states) < MEMBERS_MAX or any(state.free for state in states):
            number = self.table.add_member(0, pages * PAGE, weight)
            assert self.table.members[number].label == "ok"

    @rule(member=st.integers(0, MEMBERS_MAX - 1))
    def drain(self, member: int) -> None:
        states = self.table.members
        open_ = [n for n, state in enumerate(states) if not (state.draining or state.gone)]
        if member in open_ and len(open_) > 1:
            self.table.start_drain(member)

    @rule(name=NAMES)
    def begin_move(self, name: int) -> None:
        block = self.present.get(key_of(name))
        if block is None or not self.table.members[block.member].draining:
            return
        copy = self.table.reserve_move(block)
        if copy is not None:
            assert copy.member != block.member
            self.table.pin(block)
            self.moves.append((block, copy))

    @precondition(lambda self: self.moves)
    @rule(data=st.data(), ok=st.booleans())
    def end_move(self, data: st.DataObject, ok: bool) -> None:
        block, copy = self.moves.pop(data.draw(st.integers(0, len(self.moves) - 1)))
        if not ok:
            self.table.abandon_move(copy)
        elif self.table.commit_move(block, copy):
            assert self.present[block.key] is block
            self.present[block.key] = copy
        else:
            assert self.present.get(block.key) is not block
        self.table.unpin(block)

    @rule(member=st.integers(0, MEMBERS_MAX - 1))
    def go(self, member: int) -> None:
        states = self.table.members
        if member >= len(states) or not states[member].draining or states[member].gone:
            return
        if self.table.writes_on(member) or self.moves:
            return
        for block in self.table.blocks_on(member):
            self.table.drop(block)
            assert self.present.pop(block.key) is block
        self.table.remove_member(member)

    @invariant()
    def same(self) -> None:
        if not hasattr(self, "table"):
            return
        self.table.check_integrity()
        assert len(self.table) == len(self.present)
        for key, block in self.present.items():
            found = self.table.find(key)
            assert found is (block if self.table.members[block.member].healthy else None)


TestHistories = pytest.mark.slow(Histories.TestCase)
TestHistories.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


def test_a_stored_table_gives_the_same_order_of_eviction() -> None:
    generator = random.Random(9)

    def table() -> Table:
        return Table([(0, 200 * PAGE)], [1.0])

    first = table()
    for name in range(200):
        block, _ = first.reserve(new_block(key_of(name), ROOT, PAGE, name, "", generator.choice((0.0, 1e-5, 3e-5))))
        assert block is not None
        first.commit(block)
    for _ in range(500):
        found = first.find(key_of(generator.randrange(200)))
        assert found is not None
        first.touch(found)
    rows = []
    for block in first.blocks_on(0):
        copy = Block(block.key, block.parent, 0, block.offset, block.size_bytes, block.position)
        copy.rebuild_s, copy.uses = block.rebuild_s, block.uses
        rows.append((copy, first.value(block.key)))
    generator.shuffle(rows)
    second = table()
    assert second.restore(0, rows) == []
    second.check_integrity()
    orders = []
    for one in (first, second):
        order = []
        for name in range(1000, 1150):
            block, gone = one.reserve(new_block(key_of(name), ROOT, PAGE, name))
            assert block is not None
            one.commit(block)
            order += [old.key for old in gone]
        orders.append(order)
    assert orders[0] == orders[1]


def test_rows_that_cannot_be_are_returned() -> None:
    table = Table([(0, 8 * PAGE), (0, 8 * PAGE)], [1.0, 1.0])

    def row(name: object, offset: int, size: int = PAGE, parent: bytes = ROOT) -> tuple[Block, float]:
        return Block(key_of(name), parent, 0, offset, size, 0), 1.0

    assert table.restore(0, [row("a", 0), row("b", 2 * PAGE, 3 * PAGE)]) == []
    rows = [
        row("a", 0),
        row("c", 0),
        row("d", 7 * PAGE, 2 * PAGE),
        row("e", PAGE, 0),
        row("f", 4 * PAGE, PAGE, key_of("f")),
    ]
    lost = table.restore(1, rows)
    assert {block.key for block in lost} == {key_of(name) for name in "adef"}
    table.check_integrity()
    assert [table.find(key_of(name)) is not None for name in "abcdef"] == [True, True, True, False, False, False]


def write_all(table: Table, news: list[NewBlock]) -> int:
    """Write blocks one after the other; returns how many blocks had to leave."""
    evictions = 0
    for new in news:
        block, gone = table.reserve(new)
        assert block is not None
        table.commit(block)
        evictions += len(gone)
    return evictions


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["three models", "any size", "tenants"])
def test_free_space_stays_usable_over_many_times_the_capacity(kind: str) -> None:
    """20 times the capacity of mixed sizes, in prefixes of 1 to 40 blocks, in four periods: evictions per write, free
    space, holes, and the largest hole's part of the free space stay what they were once the pool was full.
    Measured: 1.0 evictions per write; free 3 % (three models), 7 % (any size), 0.1 % (a quota for each size)."""
    generator = random.Random(5)
    pages = 8192
    quotas = TenantQuotas(default_bytes=pages * PAGE // 6) if kind == "tenants" else TenantQuotas()
    table = Table([(0, pages * PAGE // 2)] * 2, [1.0, 1.0], quotas)
    sizes = {"three models": (2, 5, 16), "any size": tuple(range(1, 17)), "tenants": (2, 5, 16)}[kind]
    periods: list[list[tuple[float, float, float, float]]] = [[], [], [], []]
    written = number = 0
    while written < 20 * pages:
        size, prefix, length = generator.choice(sizes), number, generator.randrange(1, 41)
        number += 1
        news = [
            new_block(key_of((prefix, i)), key_of((prefix, i - 1)), size * PAGE, prefix * 7 + i, f"t{size % 5}")
            for i in range(length)
        ]
        evicted = write_all(table, news)
        allocators = [state.space.allocator for state in table.members]
        free = sum(allocator.free_bytes for allocator in allocators)
        largest = max(allocator.largest_bytes for allocator in allocators)
        if written > 2 * pages:
            sample = (evicted / length, free / (pages * PAGE), sum(a.holes for a in allocators), largest / max(1, free))
            periods[written // (5 * pages)].append(sample)
        written += size * length
        for old in generator.choices(range(max(0, number - 60), number), k=2):  # what is used again lies anywhere
            for i in range(40):
                found = table.find(key_of((old, i)))
                if found is not None:
                    table.touch(found)
    table.check_integrity()
    means = [tuple(fmean(column) for column in zip(*period, strict=True)) for period in periods]
    first, last = means[1], means[3]
    assert last[0] < 1.15 * first[0] + 0.05, f"evictions per write: {means}"
    assert max(mean[1] for mean in means) < 0.1, f"free space: {means}"
    assert last[2] < 1.25 * first[2] + 10, f"holes: {means}"
    assert last[3] > 0.6 * first[3], f"largest hole in the free space: {means}"
    assert table.scans < 0.001 * sum(map(len, periods)) + 1
