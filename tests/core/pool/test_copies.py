"""Marks of copies, their accounts, and the choice of a holder to read from."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.core.new_block import TENANT_BYTES, tenant_tag
from penstock.core.pool.copies import COPY_ACCOUNTS_MAX, CopyAccounts, copy_of, is_copy, original_of, split_reads
from penstock.core.pool.placement import copy_node
from tests.pool.helpers import key_of


@given(st.sampled_from([b"", b"copy", tenant_tag("a"), b"copyabcd"]))
def test_a_mark_can_be_taken_off_and_is_put_on_once(tenant: bytes) -> None:
    if len(tenant) in (0, TENANT_BYTES):
        assert not is_copy(tenant) and original_of(tenant) == tenant
        assert original_of(copy_of(tenant)) == tenant
    assert is_copy(copy_of(tenant)) and copy_of(copy_of(tenant)) == copy_of(tenant)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=60), st.integers(0, 40))
def test_copies_keep_their_limit_and_the_largest_makes_room(writes: list[tuple[int, int]], limit: int) -> None:
    accounts, held = CopyAccounts(), dict[bytes, int]()
    accounts.limit_bytes = limit
    for tenant, size in writes:
        account = copy_of(tenant_tag(str(tenant)))
        while accounts.admits(account, size) and not accounts.fit(size):
            loser = accounts.loser(account, size)
            assert loser is not None
            if account not in held:
                assert held[loser] == max(held.values())
            elif loser == account:
                assert max(held.values()) <= held[account] + size, "nobody holds more than the writer would"
            else:
                assert held[loser] == max(held.values()) > held.get(account, 0) + size
            held[loser] -= 1
            accounts.set(loser, held[loser])
            held = {one: count for one, count in held.items() if count}
        if accounts.admits(account, size):
            held[account] = held.get(account, 0) + size
            accounts.set(account, held[account])
        assert accounts.held_bytes == sum(held.values()) <= limit


def test_tenants_with_copies_are_bounded() -> None:
    accounts = CopyAccounts()
    accounts.limit_bytes = 1 << 40
    for tenant in range(COPY_ACCOUNTS_MAX):
        assert accounts.admits(copy_of(tenant_tag(str(tenant))), 1)
        accounts.set(copy_of(tenant_tag(str(tenant))), 1)
    assert not accounts.admits(copy_of(tenant_tag("more")), 1) and accounts.admits(copy_of(tenant_tag("3")), 1)
    assert len(accounts) == COPY_ACCOUNTS_MAX


HOLDERS = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=2, unique=True), max_size=40)


@given(
    HOLDERS, st.lists(st.integers(0, 100), min_size=5, max_size=5), st.lists(st.integers(1, 9), min_size=5, max_size=5)
)
def test_each_block_is_read_where_the_queue_with_it_ends_first(
    holders: list[list[int]], queued: list[int], rates: list[int]
) -> None:
    chosen = split_reads(holders, 4, dict(enumerate(map(float, queued))), dict(enumerate(map(float, rates))))
    ends = [queue / rate for queue, rate in zip(queued, rates, strict=True)]
    for some, one in zip(holders, chosen, strict=True):
        assert one in some
        assert all(ends[one] + 4 / rates[one] <= ends[other] + 4 / rates[other] + 1e-9 for other in some)
        ends[one] += 4 / rates[one]


def test_a_span_that_two_idle_nodes_hold_is_read_from_both_by_their_rates() -> None:
    chosen = split_reads([[0, 1]] * 60, 1 << 20, {}, {0: 2e9, 1: 1e9})
    assert chosen.count(0) == 40
    assert split_reads([[0, 1]] * 4, 1, {0: 100.0}, {0: 1.0, 1: 1.0}) == [1] * 4


def test_copies_of_a_striped_pool_spread_by_weight_and_stay_when_another_node_goes() -> None:
    nodes = [(at, f"node{at}", 1.0 + (at == 0)) for at in range(5)]
    keys = [key_of(at) for at in range(6000)]
    before = [copy_node(key, nodes) for key in keys]
    counts = [before.count(at) for at in range(5)]
    assert abs(counts[0] - 2000) < 200 and all(abs(count - 1000) < 150 for count in counts[1:])
    assert before == [copy_node(key, nodes[::-1]) for key in keys]
    after = [copy_node(key, nodes[:3] + nodes[4:]) for key in keys]
    assert all(a == b for a, b in zip(after, before, strict=True) if b != 3)
    assert copy_node(keys[0], []) is None and copy_node(keys[0], [(1, "a", 0.0)]) is None
