"""Whose blocks leave: random histories of tenants by name and by default, nobody and invented ones; and attacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.core.new_block import tenant_tag
from penstock.core.pool.policy import PoolPolicy
from penstock.core.pool.quota import SHARED, TenantQuotas
from penstock.pool.block import Block
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.local.table import Table
from penstock.pool.members.memory import MemoryMember
from tests.pool.helpers import ROOT, chain, key_of, new_block, write

PAGE = 4096
TENANTS = ("", "named", "other", "honest", *(f"x{i}" for i in range(12)))


class Histories(RuleBasedStateMachine):
    """Blocks of 1 to 4 pages on two members of 40 pages, by sixteen tenants of which two have quotas by name."""

    @initialize(default=st.sampled_from([None, 0, 6 * PAGE, 12 * PAGE, 60 * PAGE]), named=st.sampled_from([0, 20, 50]))
    def begin(self, default: int | None, named: int) -> None:
        quotas = {tenant_tag("named"): named * PAGE, tenant_tag("other"): 8 * PAGE} if named else {}
        self.table = Table([(0, 40 * PAGE), (0, 40 * PAGE)], [1.0, 1.0], TenantQuotas(quotas, default))
        self.present: dict[bytes, Block] = {}
        self.readers: list[Block] = []
        self.number = 0
        self.moves: list[tuple[Block, Block]] = []

    @rule(tenant=st.sampled_from(TENANTS), pages=st.integers(1, 4), count=st.integers(1, 8), child=st.booleans())
    def write(self, tenant: str, pages: int, count: int, child: bool) -> None:
        for _ in range(count):
            self.number += 1
            parent = next(reversed(self.present), ROOT) if child else ROOT
            new = new_block(key_of(self.number), parent, pages * PAGE, self.number, tenant)
            quotas = self.table.quotas
            account = quotas.account(new.tenant)
            quotas.charge(account, pages * PAGE)
            own, writer_excess = quotas.payer(account), quotas.excess_bytes(account)
            excess = {quotas.payer(name): quotas.excess_bytes(name) for name, _ in quotas}
            payers = {block.key: quotas.payer(block.account) for block in self.present.values()}
            quotas.credit(account, pages * PAGE)
            block, gone = self.table.reserve(new)
            own_left, still_over = False, writer_excess
            for old in gone:
                assert old not in self.readers and self.present.pop(old.key) is old
                payer = payers[old.key]
                own_left = own_left or payer == own
                if payer != own:
                    assert excess[payer] > max(0, still_over), "one within its quota, or less over, gave way"
                    if writer_excess <= 0:
                        assert not own_left, "others give way first what they are over by"
                else:  # what it gave up itself may have brought it within its quota
                    still_over -= old.extent_bytes
                excess[payer] -= old.extent_bytes
            if block is None:
                still = {payers[key] for key in self.present}
                hindered = self.readers or self.moves or not all(state.healthy for state in self.table.members)
                may = {payer for payer in still if payer == own or excess[payer] > max(0, writer_excess)}
                assert hindered or pages > 1 or not may, "what could give way did not"
            else:
                self.table.commit(block)
                self.present[block.key] = block

    @rule(number=st.integers(0, 400), hold=st.booleans())
    def use(self, number: int, hold: bool) -> None:
        block = self.table.find(key_of(self.number - number))
        if block is not None:
            self.table.touch(block)
            if hold:
                self.table.pin(block)
                self.readers.append(block)

    @precondition(lambda self: self.readers)
    @rule()
    def release(self) -> None:
        self.table.unpin(self.readers.pop())

    @rule(number=st.integers(0, 400))
    def drop(self, number: int) -> None:
        block = self.present.pop(key_of(self.number - number), None)
        if block is not None:
            self.table.drop(block)

    @rule(member=st.integers(0, 1), healthy=st.booleans())
    def fence(self, member: int, healthy: bool) -> None:
        self.table.set_healthy(member, healthy)

    @rule(number=st.integers(0, 100))
    def begin_move(self, number: int) -> None:
        block = self.present.get(key_of(self.number - number))
        copy = self.table.reserve_move(block) if block is not None else None
        if block is not None and copy is not None:
            self.table.pin(block)
            self.moves.append((block, copy))

    @precondition(lambda self: self.moves)
    @rule()
    def end_move(self) -> None:
        block, copy = self.moves.pop()
        if self.table.commit_move(block, copy):
            self.present[block.key] = copy
        self.table.unpin(block)

    @rule(default=st.sampled_from([None, 5 * PAGE, 20 * PAGE]), named=st.sampled_from([0, 10, 100]))
    def change(self, default: int | None, named: int) -> None:
        self.table.quotas.set_quotas({tenant_tag("named"): named * PAGE} if named else {}, default)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "table"):
            self.table.check_integrity()
            assert len(self.table) == len(self.present)


def test_a_writer_that_gave_way_until_it_is_within_its_quota_displaces_one_that_is_over() -> None:
    """Found by a random history: both of its own that may leave are gone, and it is over by nothing any more."""
    state = Histories()
    state.begin(default=None, named=20)
    state.begin_move(number=0)
    state.write(child=True, count=8, pages=4, tenant="")
    state.write(child=True, count=3, pages=1, tenant="x4")
    state.begin_move(number=11)
    state.write(child=True, count=1, pages=2, tenant="")
    for number in (0, 43, 60):
        state.begin_move(number=number)
    state.end_move()
    state.begin_move(number=0)
    state.end_move()
    state.begin_move(number=0)
    state.use(hold=True, number=115)
    state.end_move()
    for _ in range(2):
        state.begin_move(number=0)
        state.end_move()
    state.write(child=True, count=2, pages=3, tenant="named")
    state.write(child=True, count=5, pages=3, tenant="named")
    state.begin_move(number=99)
    state.begin_move(number=16)
    state.end_move()
    state.begin_move(number=23)
    state.begin_move(number=26)
    state.write(child=False, count=8, pages=2, tenant="x7")
    state.write(child=True, count=1, pages=4, tenant="other")
    state.begin_move(number=46)
    state.write(child=False, count=4, pages=4, tenant="named")
    state.holds()


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)


def test_after_a_restart_those_whose_blocks_are_worth_most_have_the_default_quota() -> None:
    """Thirty tenants that wrote before the honest one, and whose rows come first, were never used again."""
    rows: list[tuple[Block, float]] = []
    for number in range(40):
        owner = f"x{number}" if number < 30 else "honest"
        block = Block(key_of(number), ROOT, 0, number * PAGE, PAGE, number, tenant=tenant_tag(owner))
        block.uses = 3 if owner == "honest" else 1
        rows.append((block, float(number)))
    table = Table([(0, 40 * PAGE)], [1.0], TenantQuotas(default_bytes=10 * PAGE))
    assert table.restore(0, rows) == []
    table.check_integrity()
    for number in range(100):
        new, gone = table.reserve(new_block(key_of(("new", number)), ROOT, PAGE, number, f"y{number}"))
        assert new is not None
        table.commit(new)
        assert not any(old.tenant == tenant_tag("honest") for old in gone)
    table.check_integrity()


def full_table(pages: int, owners: tuple[str, ...]) -> Table:
    """One-page blocks of tenants that have all of the pool by name, in turns."""
    table = Table(
        [(0, pages * PAGE)], [1.0], TenantQuotas({tenant_tag(o): pages // len(owners) * PAGE for o in owners})
    )
    for number in range(pages):
        block, _ = table.reserve(new_block(key_of(number), ROOT, PAGE, number, owners[number % len(owners)]))
        assert block is not None
        table.commit(block)
    return table


def test_a_write_that_cannot_be_had_searches_nothing() -> None:
    table = full_table(4096, ("a", "b"))
    for number in range(500):
        assert table.reserve(new_block(key_of(("new", number)), ROOT, PAGE, number)) == (None, [])
    assert table.scans == 0


def test_writes_that_find_no_hole_search_the_pool_seldom() -> None:
    """Each gives up two pages of its own, between pages of one within its quota: no two are side by side."""
    table = full_table(4096, ("a", "b"))
    left = 0
    for number in range(500):
        block, gone = table.reserve(new_block(key_of(("new", number)), ROOT, 2 * PAGE, number, "a"))
        assert block is None and all(old.tenant == tenant_tag("a") for old in gone)
        left += len(gone)
    table.check_integrity()
    assert left > 500 and table.scans <= 1 + left * 64 // (4096 - 1024 - left)


# --- the attacks, at a whole pool ---

Maker = Callable[..., LocalPool]
BLOCK = 4 * PAGE
POOL_BLOCKS = 256
DEFAULT = POOL_BLOCKS // 4 * BLOCK


@pytest.fixture
def made() -> Iterator[Maker]:
    pools: list[LocalPool] = []

    def make(members: int = 1, **policy: object) -> LocalPool:
        parts = [MemoryMember(f"memory:{i}", POOL_BLOCKS * BLOCK // members) for i in range(members)]
        pools.append(LocalPool(parts, [1.0] * members, PoolPolicy(**policy)))  # type: ignore[arg-type]
        return pools[-1]

    yield make
    for pool in pools:
        pool.check_integrity()
        pool.close(5.0)


def fill(pool: LocalPool, tenant: str, count: int, name: str = "") -> list[bytes]:
    keys = [key_of((tenant, name, i)) for i in range(count)]
    for key in keys:
        assert write(pool, key, key_of((key, "parent")), BLOCK, tenant=tenant) in ("ok", "full")
    return keys


def held(pool: LocalPool, keys: list[bytes]) -> int:
    return sum(found is not None for found in pool.lookup(keys, 1.0))


def flood(pool: LocalPool, kind: str) -> None:
    """What one attacker writes: many times what he may hold, up to twice the pool."""
    match kind:
        case "one":
            fill(pool, "evil", 2 * POOL_BLOCKS)
        case "nobody":
            fill(pool, "", 2 * POOL_BLOCKS)
        case "256 tenants":
            for number in range(256):
                fill(pool, f"evil {number}", 2)
        case "600 tenants":
            for number in range(600):
                fill(pool, f"evil {number}", 1)
        case "tenants that fake use":
            for number in range(256):
                for again in range(2):
                    held(pool, fill(pool, f"evil {number}", 1, str(again)))
        case _:
            raise AssertionError(kind)


KINDS = ["one", "nobody", "256 tenants", "600 tenants", "tenants that fake use"]


@pytest.mark.slow
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_who_is_within_the_default_quota_keeps_what_he_has(made: Maker, kind: str, members: int) -> None:
    pool = made(members, default_quota_bytes=DEFAULT)
    kept = fill(pool, "honest", 25)
    assert held(pool, kept) == 25
    flood(pool, kind)
    assert held(pool, kept) == 25
    stat = pool.stat(1.0)
    assert stat.evictions == sum(count for _, count in stat.evictions_by) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_who_has_a_quota_by_name_keeps_it_and_gets_it_back(made: Maker, kind: str) -> None:
    """With a default, and without: who has no quota then has no guarantee either."""
    for default in (DEFAULT, None):
        pool = made(2, default_quota_bytes=default, quota_bytes={tenant_tag("honest"): 125 * BLOCK})
        kept = fill(pool, "honest", 25)
        flood(pool, kind)
        assert held(pool, kept) == 25
        kept += fill(pool, "honest", 100, "more")
        flood(pool, kind)
        assert held(pool, kept) == 125


def test_nobody_is_held_to_its_quota_and_keeps_it(made: Maker) -> None:
    pool = made(default_quota_bytes=DEFAULT)
    kept = fill(pool, "", POOL_BLOCKS // 4)
    flood(pool, "256 tenants")
    assert held(pool, kept) == POOL_BLOCKS // 4


def test_who_comes_after_a_flood_gets_room_and_keeps_it_once_it_is_used(made: Maker) -> None:
    pool = made(default_quota_bytes=DEFAULT)
    flood(pool, "256 tenants")
    kept = fill(pool, "late", 12)
    assert held(pool, kept) == 12, "at the cost of those who are over"
    flood(pool, "600 tenants")
    flood(pool, "nobody")
    assert held(pool, kept) == 12, "its blocks were used, so the quota of one who never was is its own"


def test_where_all_are_within_their_quotas_the_writer_gives_way_or_is_refused(made: Maker) -> None:
    quotas = {tenant_tag(name): POOL_BLOCKS // 2 * BLOCK for name in ("a", "b")}
    pool = made(quota_bytes=quotas)
    kept = fill(pool, "a", POOL_BLOCKS // 2) + fill(pool, "b", POOL_BLOCKS // 2)
    assert write(pool, key_of("c"), ROOT, BLOCK, tenant="c") == "full"
    assert write(pool, key_of("nobody"), ROOT, BLOCK) == "full"
    assert write(pool, key_of("new"), ROOT, BLOCK, tenant="a") == "ok"
    assert held(pool, kept[:128]) == 127 and held(pool, kept[128:]) == 128
    assert dict(pool.stat(1.0).evictions_by) == {"asked": 0, "own": 1, "shared": 0, "over_quota": 0}


def test_nobody_gives_way_on_one_member_while_another_is_over_on_the_other(made: Maker) -> None:
    """Both honest tenants fill one member, the one that is over fills the other."""
    pool = made(2, default_quota_bytes=DEFAULT)
    first = [located(pool, write_at(pool, ("probe", i), i, "probe")) for i in range(4)]
    on_one = next(i for i in range(4) if first[i] == "memory:0")
    on_two = next(i for i in range(4) if first[i] == "memory:1")
    assert pool.evict([key_of(("probe", i)) for i in range(4)]) == 4
    honest = [write_at(pool, ("honest", i), on_one, f"honest {i % 2}") for i in range(128)]
    for i in range(128):
        write_at(pool, ("evil", i), on_two, "evil")
    assert {located(pool, key) for key in honest} == {"memory:0"}
    third = [write_at(pool, ("third", i), on_one, "third") for i in range(14)]
    assert held(pool, honest) == 128 and held(pool, third) == 14
    assert dict(pool.stat(1.0).evictions_by)["over_quota"] == 14


def write_at(pool: LocalPool, name: object, position: int, tenant: str) -> bytes:
    key = key_of(name)
    assert write(pool, key, key_of((name, "parent")), BLOCK, position=position, tenant=tenant) == "ok"
    return key


def located(pool: LocalPool, key: bytes) -> str:
    found = pool.lookup([key], 1.0)[0]
    assert found is not None
    return found.route[0]


def test_one_that_writes_children_of_anothers_blocks_is_charged_and_holds_up_nothing(made: Maker) -> None:
    pool = made(default_quota_bytes=DEFAULT)
    first = chain("tree", 64)
    for key, parent in first:
        assert write(pool, key, parent, BLOCK, tenant="honest") == "ok"
        assert write(pool, key_of((key, "child")), key, BLOCK, tenant="evil") == "ok"
    stat = dict(pool.stat(1.0).tenants)
    assert stat == {tenant_tag("honest").hex(): 64 * BLOCK, tenant_tag("evil").hex(): 64 * BLOCK}
    for key, parent in chain("next", 192):
        assert write(pool, key, parent, BLOCK, tenant="honest") == "ok", "old blocks leave in spite of their children"
    assert held(pool, [key for key, _ in chain("next", 192)]) == 192 and held(pool, [key for key, _ in first]) == 0


def test_a_block_that_is_there_stays_charged_to_who_wrote_it_first(made: Maker) -> None:
    pool = made(default_quota_bytes=DEFAULT)
    for tenant in ("first", "second", ""):
        assert write(pool, key_of("same"), ROOT, BLOCK, tenant=tenant) == "ok"
    assert dict(pool.stat(1.0).tenants) == {tenant_tag("first").hex(): BLOCK}


def test_leased_blocks_of_one_over_its_quota_make_others_neither_give_way_nor_wait(made: Maker) -> None:
    pool = made(default_quota_bytes=DEFAULT)
    kept = fill(pool, "honest", 25)
    leases = [pool.lease(key) for key in fill(pool, "evil", 231)]
    assert write(pool, key_of("new"), ROOT, BLOCK, tenant="evil") == "full"
    assert write(pool, key_of("new"), ROOT, BLOCK) == "full" and held(pool, kept) == 25
    assert write(pool, key_of("new"), ROOT, BLOCK, tenant="honest") == "ok" and held(pool, kept) == 24
    for lease in leases:
        assert lease is not None
        lease.release()
    assert write(pool, key_of("newer"), ROOT, BLOCK, tenant="honest") == "ok" and held(pool, kept) == 24
    assert pool.stat(1.0).over_quota[0][0] == tenant_tag("evil").hex()


def test_only_tenants_by_name_write_where_others_are_refused(made: Maker) -> None:
    pool = made(quota_bytes={tenant_tag("a"): DEFAULT}, named_tenants_only=True)
    assert [write(pool, key_of(t), tenant=t) for t in ("a", "b", "")] == ["ok", "dropped", "dropped"]
    assert write(pool, key_of("a"), tenant="b") == "ok", "it is there already: nothing is stored"
    assert pool.stat(1.0).writes_refused == 2
    pool.set_policy(PoolPolicy())
    assert write(pool, key_of("b"), tenant="b") == "ok"
    assert pool.stat(1.0).tenants[0][0] != SHARED.hex()
