"""What copies may take of a node, and whose room: random histories of the table, and a pool that is started again."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from penstock.core.new_block import NewBlock, tenant_tag
from penstock.core.pool.copies import copy_of, is_copy, original_of
from penstock.core.pool.policy import PoolPolicy
from penstock.core.pool.quota import TenantQuotas
from penstock.pool.block import Block
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.local.table import Table
from penstock.pool.members.device import open_slab_member
from penstock.pool.members.memory import MemoryMember
from tests.pool.helpers import ROOT, Outcome, key_of, new_block, read, staged, write

PAGE = 4096
MEMBER_PAGES = 40
TENANTS = ("", "named", *(f"x{at}" for at in range(5)))


class Histories:
    """Blocks of one page, originals and copies, on two members."""

    def __init__(self, share: float, default: int | None) -> None:
        quotas = TenantQuotas({tenant_tag("named"): 20 * PAGE}, default, copies_share=share)
        self.table = Table([(0, MEMBER_PAGES * PAGE)] * 2, [1.0, 1.0], quotas)
        self.present: dict[bytes, Block] = {}
        self.readers: list[Block] = []
        self.number = 0
        self.lowered = False  # the share is lower than what copies were given before

    @property
    def copies(self) -> list[Block]:
        return [block for block in self.present.values() if is_copy(block.tenant)]

    def write(self, tenant: str, count: int, copies: bool, child: bool) -> None:
        for _ in range(count):
            self.number += 1
            parent = next(reversed(self.present), ROOT) if child else ROOT
            new = new_block(key_of(self.number), parent, PAGE, self.number, tenant)
            if copies:
                new = NewBlock(new.key, parent, PAGE, self.number, copy_of(new.tenant))
            self.put(new)

    def put(self, new: NewBlock) -> None:
        quotas = self.table.quotas
        copies, limit = len(self.copies) * PAGE, quotas.copies.limit_bytes
        originals = len(self.present) * PAGE - copies
        worth = {key: self.table.value(key) for key in self.present}
        held = {block.tenant: 0 for block in self.copies} | {new.tenant: 0}
        for one in self.copies:
            held[one.tenant] += PAGE
        parents = {(block.parent, block.tenant) for block in self.present.values()}
        block, gone = self.table.reserve(new)
        for old in gone:
            assert old not in self.readers and self.present.pop(old.key) is old
            children = {(one.parent, one.tenant) for one in gone}
            assert (old.key, old.tenant) not in parents - children, "leaf before root"
            if is_copy(new.tenant) and not is_copy(old.tenant):
                assert originals > 2 * MEMBER_PAGES * PAGE - limit, "a copy takes what originals have beyond their part"
                originals -= PAGE
            if is_copy(new.tenant) and is_copy(old.tenant):
                if old.tenant != new.tenant:
                    most = max(held.values())
                    assert held[old.tenant] == most > held[new.tenant] + PAGE or not held[new.tenant], "who holds most"
                held[old.tenant] -= PAGE
            if not is_copy(new.tenant) and not is_copy(old.tenant) and quotas.copies_share:
                cold = [
                    one for one in self.copies
                    if one.member == old.member and one not in self.readers and worth[one.key] < worth[old.key]
                    and not any((other.parent, other.tenant) == (one.key, one.tenant) for other in self.copies)
                ]  # fmt: skip
                assert not cold, "a copy of less worth goes before an original"
        if block is not None:
            self.table.commit(block)
            self.present[block.key] = block
        if is_copy(new.tenant) and block is not None:
            assert quotas.copies.held_bytes <= limit, "also where space is free"

    def use(self, number: int, hold: bool) -> None:
        block = self.table.find(key_of(self.number - number))
        if block is not None:
            self.table.touch(block)
            if hold:
                self.table.pin(block)
                self.readers.append(block)

    def release(self) -> None:
        self.table.unpin(self.readers.pop())

    def change(self, share: float) -> None:
        quotas = self.table.quotas
        quotas.set_quotas({tenant_tag("named"): 20 * PAGE}, None, share)
        self.lowered = self.lowered or quotas.copies.held_bytes > quotas.copies.limit_bytes

    def holds(self) -> None:
        self.table.check_integrity()
        assert len(self.table) == len(self.present)
        copies = self.table.quotas.copies
        assert copies.held_bytes == len(self.copies) * PAGE
        assert self.lowered or copies.held_bytes <= copies.limit_bytes


@pytest.mark.parametrize("seed", range(40))
def test_copies_keep_their_share_under_random_histories(seed: int) -> None:
    chance = random.Random(seed)
    state = Histories(chance.choice((0.0, 0.1, 0.25, 0.5)), chance.choice((None, 6 * PAGE)))
    for _ in range(40):
        step = chance.random()
        if step < 0.5:
            state.write(chance.choice(TENANTS), chance.randint(1, 12), chance.random() < 0.5, chance.random() < 0.5)
        elif step < 0.8:
            state.use(chance.randint(0, 200), chance.random() < 0.3)
        elif step < 0.93 and state.readers:
            state.release()
        elif step >= 0.93:
            state.change(chance.choice((0.0, 0.1, 0.4)))
        state.holds()


def copy_to(pool: LocalPool, key: bytes, parent: bytes = ROOT, tenant: str = "") -> str:
    ended = Outcome()
    block = NewBlock(key, parent, PAGE, 0, copy_of(tenant_tag(tenant)))
    pool.write(block, staged(key, PAGE), 10.0, ended)
    return ended.reason()


def pool_of(pages: int, share: float, **more: object) -> LocalPool:
    member = MemoryMember("memory:0", pages * PAGE)
    return LocalPool([member], [1.0], PoolPolicy(copies_share=share, **more))  # type: ignore[arg-type]


def test_copies_take_their_share_of_a_full_pool_and_no_more() -> None:
    pool = pool_of(100, 0.2)
    try:
        for at in range(100):
            assert write(pool, key_of(at)) == "ok"
        for at in range(50):
            assert copy_to(pool, key_of(("copy", at))) == "ok"
        stat = pool.stat(1.0)
        assert stat.copies == (("", 20 * PAGE),) and stat.tenants == (("", 80 * PAGE),)
        for at in range(200, 320):
            assert write(pool, key_of(at)) == "ok"
        assert sum(held for _, held in pool.stat(1.0).copies) < 20 * PAGE, "cold copies leave as cold originals do"
        pool.check_integrity()
    finally:
        pool.close(1.0)


def test_copies_that_are_read_stay_beside_originals_that_come_and_go() -> None:
    pool = pool_of(100, 0.2)
    try:
        hot = [key_of(("copy", at)) for at in range(20)]
        assert all(copy_to(pool, key) == "ok" for key in hot)
        for at in range(400):
            assert write(pool, key_of(at)) == "ok"
            if not at % 10:
                assert None not in pool.lookup(hot, 1.0)
        assert pool.stat(1.0).tenants == (("", 80 * PAGE),)
    finally:
        pool.close(1.0)


def test_one_tenants_copies_make_room_for_anothers() -> None:
    pool = pool_of(100, 0.2)
    try:
        for at in range(60):
            assert copy_to(pool, key_of(("greedy", at)), tenant="greedy") == "ok"
        for at in range(60):
            assert copy_to(pool, key_of(("late", at)), tenant="late") == "ok"
        copies = dict(pool.stat(1.0).copies)
        assert sum(copies.values()) == 20 * PAGE
        assert abs(copies[tenant_tag("late").hex()] - copies[tenant_tag("greedy").hex()]) <= 2 * PAGE
    finally:
        pool.close(1.0)


def test_without_a_share_no_copy_is_stored_and_an_original_replaces_a_copy() -> None:
    pool = pool_of(20, 0.0)
    try:
        assert copy_to(pool, key_of("a")) == "full"
        pool.set_policy(PoolPolicy(copies_share=0.5))
        assert copy_to(pool, key_of("a")) == "ok" and copy_to(pool, key_of("a")) == "ok"
        assert write(pool, key_of("a"), tenant="t") == "ok"
        assert pool.stat(1.0).copies == () and pool.stat(1.0).tenants == ((tenant_tag("t").hex(), PAGE),)
        assert copy_to(pool, key_of("a")) == "ok" and pool.stat(1.0).copies == ()
        assert read(pool, key_of("a")) == "ok"
        pool.check_integrity()
    finally:
        pool.close(1.0)


def test_where_only_named_tenants_write_only_theirs_are_copied() -> None:
    pool = pool_of(20, 0.5, quota_bytes={tenant_tag("t"): 5 * PAGE}, named_tenants_only=True)
    try:
        assert copy_to(pool, key_of("a"), tenant="t") == "ok"
        assert copy_to(pool, key_of("b"), tenant="stranger") == "dropped"
    finally:
        pool.close(1.0)


def test_a_slab_knows_its_copies_after_a_restart(tmp_path: Path) -> None:
    def opened(share: float) -> LocalPool:
        member = open_slab_member("ssd:0", tmp_path / "slab", 4 << 20, None, 8)
        return LocalPool([member], [1.0], PoolPolicy(copies_share=share))

    pool = opened(0.5)
    assert copy_to(pool, key_of("a"), tenant="t") == "ok" and copy_to(pool, key_of("b")) == "ok"
    assert write(pool, key_of("c"), tenant="t") == "ok"
    before = pool.stat(1.0)
    assert len(before.copies) == 2
    pool.close(5.0)
    for share in (0.5, 0.0):
        pool = opened(share)
        stat = pool.stat(1.0)
        assert (sorted(stat.copies), stat.tenants) == (sorted(before.copies), before.tenants)
        assert [read(pool, key_of(name)) for name in "abc"] == ["ok"] * 3
        assert {original_of(one.tenant) for one in pool.origins([key_of("a")]) if one} == {tenant_tag("t")}
        pool.check_integrity()
        pool.close(5.0)
