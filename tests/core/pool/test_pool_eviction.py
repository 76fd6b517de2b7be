"""Who gives way when a member needs room: worth, quotas, fenced members; and the accounts behind it."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.pool.pool_eviction import FENCED_EVICTIONS_MAX, PoolEviction
from penstock.core.pool.quota import ACCOUNTS_MAX, SHARED, TenantQuotas

ROOT = b"r" * 16
A, B, C = b"aaaaaaaa", b"bbbbbbbb", b"cccccccc"


def key(name: object) -> bytes:
    return hashlib.blake2b(str(name).encode(), digest_size=16).digest()


def row(kept: PoolEviction, name: object) -> int:
    return kept.rows.find(key(name))


def keeping(quotas: dict[bytes, int] | None = None, default: int | None = None, members: int = 2) -> PoolEviction:
    return PoolEviction(members, TenantQuotas(quotas, default), 1, 12345)


def add(
    kept: PoolEviction, name: object, tenant: bytes = b"", member: int = 0, size: int = 10, cost: float = 0.0
) -> None:
    """A block without a parent in the pool."""
    account = kept.quotas.account(tenant)
    kept.quotas.charge(account, size)
    kept.add(key(name), key(("above", name)), member, account, size, cost)


def evict(kept: PoolEviction, tenant: bytes = b"", more: int = 10, member: int = 0) -> list[bytes]:
    gone = released(kept, kept.evict(member, kept.quotas.account(tenant), more))
    kept.check_integrity()
    return gone


def released(kept: PoolEviction, rows: list[int]) -> list[bytes]:
    """The keys of rows that left."""
    keys = [kept.rows.key(one) for one in rows]
    for one in rows:
        kept.rows.release(one)
    return keys


def test_without_quotas_the_least_worth_of_the_member_leaves_whoever_writes() -> None:
    kept = keeping()
    for i, tenant in enumerate((A, B, C, A)):
        add(kept, i, tenant)
    add(kept, "elsewhere", B, member=1)
    kept.touch(row(kept, 0))
    assert [evict(kept, C) for _ in range(5)] == [[key(1)], [key(2)], [key(3)], [key(0)], []]


def test_what_is_dear_to_rebuild_stays() -> None:
    kept = keeping()
    add(kept, "dear", A, cost=1e-7)
    add(kept, "cheap", B, cost=1e-9)
    assert evict(kept, A) == [key("cheap")]


def test_whoever_is_over_its_quota_takes_room_from_itself() -> None:
    kept = keeping({A: 20})
    add(kept, "b", B)
    for i in range(3):
        add(kept, i, A)
    assert evict(kept, A) == [key(0)]
    assert evict(kept, B) == [key(1)], "the one over its quota pays"


def test_the_one_most_over_its_quota_pays_first() -> None:
    kept = keeping(default=20)
    for i in range(3):
        add(kept, ("b", i), B)
    for i in range(5):
        add(kept, ("c", i), C)
    add(kept, "a", A)
    assert evict(kept, A) == [key(("c", 0))]
    kept.quotas.credit(C, 40)
    assert evict(kept, A) == [key(("b", 0))]
    kept.quotas.credit(B, 30)
    kept.quotas.charge(B, 10)
    assert evict(kept, A) == [key("a")], "nobody is over: the writer itself"
    assert evict(kept, A) == [], "and nobody else"


def test_whoever_is_over_and_has_nothing_there_takes_nothing_from_those_within() -> None:
    kept = keeping(default=20)
    add(kept, "b", B)
    for i in range(2):
        add(kept, ("a", i), A, member=1)
    assert evict(kept, A) == []
    for i in range(5):
        add(kept, ("c", i), C)
    assert evict(kept, A) == [key(("c", 0))], "but from one further over than itself"
    assert not kept.may_displace(row(kept, "b"), A, 10) and kept.may_displace(row(kept, ("c", 1)), A, 10)
    assert kept.may_displace(row(kept, "b"), B, 10)


def test_pinned_blocks_and_parents_do_not_pay() -> None:
    kept = keeping({A: 0})
    kept.quotas.charge(A, 20)
    kept.add(key("parent"), ROOT, 0, A, 10, 0.0)
    kept.add(key("child"), key("parent"), 0, A, 10, 0.0)
    kept.pin(row(kept, "child"))
    assert evict(kept, B) == []
    kept.unpin(row(kept, "child"))
    assert [evict(kept, B) for _ in range(2)] == [[key("child")], [key("parent")]]


def test_leaves_of_a_fenced_member_make_way_for_their_ancestors() -> None:
    """A prefix over both members, its end on the fenced one, older than what else is there."""
    kept = keeping()
    kept.quotas.charge(b"", 30)
    for i in range(3):
        kept.add(key(i), key(i - 1), i % 2, b"", 10, 0.0)
    kept.add(key(3), key(2), 1, b"", 10, 0.0)
    kept.quotas.charge(b"", 10)
    add(kept, "new")
    kept.set_fenced(1, True)
    assert evict(kept) == [key(3), key(2)], "the fenced leaf is worth least, then its parent"
    kept.set_fenced(1, False)
    assert evict(kept) == [key("new")], "the end of the prefix lies on the other member, which is well again"


def test_one_search_lets_a_bounded_number_of_fenced_leaves_go() -> None:
    kept = keeping()
    for i in range(3 * FENCED_EVICTIONS_MAX):
        add(kept, i, member=1)
    add(kept, "new")
    kept.set_fenced(1, True)
    assert len(evict(kept)) == FENCED_EVICTIONS_MAX + 1
    assert len(evict(kept)) == FENCED_EVICTIONS_MAX


def test_a_block_that_moves_is_worth_there_what_it_was_here() -> None:
    kept = keeping()
    for i in range(4):
        add(kept, i, cost=1e-8)
    for i in range(40):
        add(kept, ("other", i), member=1, cost=1e-8)
        assert evict(kept, member=1) == [key(("other", i))], "worth of member 1 ages"
    kept.move(row(kept, 3), 1)
    kept.check_integrity()
    add(kept, "cheap", member=1)
    assert evict(kept, member=1) == [key("cheap")]


def test_accounts_are_bounded_and_the_rest_share_one() -> None:
    quotas = TenantQuotas(default_bytes=5)
    accounts = {}
    for i in range(ACCOUNTS_MAX + 50):
        tenant = i.to_bytes(8, "little")
        accounts[tenant] = quotas.account(tenant)
        quotas.charge(accounts[tenant], 3)
    quotas.check_integrity()
    assert list(accounts.values()).count(SHARED) == 50 and quotas.over == {SHARED}
    assert len(dict(quotas)) == ACCOUNTS_MAX + 1
    for account in accounts.values():
        quotas.credit(account, 3)
    quotas.check_integrity()
    assert not dict(quotas) and not quotas.over
    assert quotas.account(b"somebody") == b"somebody"


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 30)), max_size=50), st.integers(0, 40))
def test_charges_and_credits_in_any_order(steps: list[tuple[int, int]], default: int) -> None:
    quotas = TenantQuotas({b"t\x00": 10, b"": 25}, default)
    held: list[tuple[bytes, int]] = []
    for tenant, size in steps:
        if tenant == 5 and held:
            quotas.credit(*held.pop(size % len(held)))
        else:
            account = quotas.account(b"t" + bytes([tenant]) if tenant else b"")
            quotas.charge(account, size)
            held.append((account, size))
        quotas.check_integrity()
    assert sum(size for _, size in quotas) == sum(size for _, size in held)


def test_a_negative_quota_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        TenantQuotas({A: -1})


def test_a_child_of_another_tenants_block_does_not_keep_it() -> None:
    """By a child each, before or after it, a stranger would fill a tenant's quota with blocks that cannot go."""
    kept = keeping({A: 20})
    kept.quotas.charge(B, 20)
    kept.add(key("early"), key("a0"), 0, B, 10, 0.0)
    for name in ("a0", "a1"):
        kept.quotas.charge(A, 10)
        kept.add(key(name), ROOT, 0, A, 10, 0.0)
    kept.add(key("late"), key("a1"), 0, B, 10, 0.0)
    assert [evict(kept, A), evict(kept, A)] == [[key("a0")], [key("a1")]]


def test_a_payer_that_is_not_over_keeps_its_blocks_on_fenced_members_too() -> None:
    kept = keeping({A: 10, B: 100})
    add(kept, "within", B, member=1)
    for i in range(3):
        add(kept, ("over", i), A, member=1)
    add(kept, "own", C)
    kept.set_fenced(1, True)
    assert evict(kept, B) == [key(("over", 0)), key(("over", 1))], "what A is over by, and no more"
    kept.quotas.credit(A, 20)
    assert evict(kept, C) == [key("own")]


def test_a_search_looks_at_few_of_many_that_are_over() -> None:
    quotas = TenantQuotas({i.to_bytes(8, "little"): 5 for i in range(5000)})
    kept = PoolEviction(2, quotas, 1, 12345)
    for i in range(5000):
        add(kept, i, i.to_bytes(8, "little"), size=10 + i % 7)
    before, names = quotas.looks, {key(i): i for i in range(5000)}
    for _ in range(1000):
        gone = released(kept, kept.evict(0, SHARED, 10))
        for one in gone:
            quotas.credit(names[one].to_bytes(8, "little"), 10 + names[one] % 7)
        assert len(gone) == 1
    kept.check_integrity()
    assert quotas.looks - before <= 4 * 1000


def test_what_invented_tenants_leave_behind_is_forgotten() -> None:
    kept = keeping()
    for i in range(20_000):
        tenant = i.to_bytes(8, "little")
        account = kept.quotas.account(tenant)
        add(kept, i, tenant)
        kept.quotas.credit(account, 10)
        assert released(kept, kept.evict(0, account, 10)) == [key(i)]
    kept.check_integrity()
    assert kept.groups <= 1
