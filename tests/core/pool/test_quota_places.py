"""Who has the default quota, where more tenants come than the pool has room for; and who is most over his own."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.pool.most_over import MostOver
from penstock.core.pool.quota import ACCOUNTS_MAX, SHARED, TenantQuotas
from penstock.core.pool.quota_places import IDLE_POOL_SIZES, UNUSED_POOL_SIZES

NOBODY = b""
HONEST, NAMED = b"honest--", b"named---"


def invented(number: int) -> bytes:
    return b"x" + number.to_bytes(7, "little")


def write(quotas: TenantQuotas, tenant: bytes, size: int = 10) -> bytes:
    account = quotas.account(tenant)
    quotas.charge(account, size)
    quotas.note_written(account, size)
    return account


def use(quotas: TenantQuotas, tenant: bytes, account: bytes, size: int = 10) -> bytes:
    """A block of `size` that is charged to `account` is used again; returns what it is charged to now."""
    after = quotas.used(tenant, account)
    if after != account:
        quotas.recharge(account, after, size)
    quotas.check_integrity()
    return after


def test_the_default_holds_for_nobody_too() -> None:
    quotas = TenantQuotas(default_bytes=25, capacity_bytes=100)
    for _ in range(4):
        assert write(quotas, NOBODY) == NOBODY
    assert quotas.quota_bytes(NOBODY) == 25 and quotas.excess_bytes(NOBODY) == 15 and quotas.over == {NOBODY}
    quotas.check_integrity()


def test_quotas_and_what_all_others_share_are_the_pool() -> None:
    quotas = TenantQuotas({NAMED: 30}, default_bytes=20, capacity_bytes=100)
    # What the name leaves of 100 is 3 times 20 and a remainder, and others share one of the three.
    accounts = {write(quotas, tenant) for tenant in (HONEST, *map(invented, range(10_000)), NAMED)}
    assert accounts == {NAMED, HONEST, invented(0), SHARED}
    assert sum(quotas.quota_bytes(account) for account in accounts) == 100
    assert quotas.quota_bytes(SHARED) == 30 and quotas.over == {SHARED}
    quotas.check_integrity()


def test_quotas_by_name_beyond_the_pool_shrink_in_proportion_and_leave_nothing() -> None:
    quotas = TenantQuotas({NAMED: 150, HONEST: 50}, default_bytes=20, capacity_bytes=100)
    assert (quotas.quota_bytes(NAMED), quotas.quota_bytes(HONEST), quotas.quota_bytes(NOBODY)) == (75, 25, 0)
    assert write(quotas, NOBODY) == SHARED and quotas.over == {SHARED}
    quotas.set_capacity(400)
    assert (quotas.quota_bytes(NAMED), quotas.quota_bytes(HONEST)) == (150, 50)
    quotas.check_integrity()


def test_a_default_quota_of_nothing_is_that_of_all_together() -> None:
    quotas = TenantQuotas(default_bytes=0, capacity_bytes=100)
    assert write(quotas, HONEST) == SHARED and quotas.quota_bytes(HONEST) == 0 and quotas.over == {SHARED}


def test_without_a_default_nobody_has_a_quota_and_each_is_counted() -> None:
    quotas = TenantQuotas(capacity_bytes=100)
    assert write(quotas, HONEST) == HONEST and write(quotas, NOBODY) == NOBODY
    assert quotas.payer(HONEST) == quotas.payer(NOBODY) == SHARED and quotas.quota_bytes(HONEST) == 100


def test_who_is_used_keeps_his_place_against_any_number_of_invented_tenants_that_fake_use() -> None:
    quotas = TenantQuotas(default_bytes=100, capacity_bytes=1000)
    use(quotas, HONEST, write(quotas, HONEST))
    for number in range(10_000):
        account = write(quotas, invented(number))
        after = quotas.used(invented(number), account)
        if after != account:
            quotas.recharge(account, after, 10)
        quotas.credit(after, 10)  # it left
        if number % (100 * IDLE_POOL_SIZES - 1) == 0:
            use(quotas, HONEST, HONEST)
        assert quotas.payer(HONEST) == HONEST
    quotas.check_integrity()


def test_a_place_that_nobody_uses_passes_to_the_next_whose_block_is_used() -> None:
    quotas = TenantQuotas(default_bytes=25, capacity_bytes=100)
    for number in range(3):
        write(quotas, invented(number), 20)
    account = write(quotas, HONEST)
    assert account == SHARED, "three of four have places, the fourth is what others share"
    assert use(quotas, HONEST, account) == SHARED, "not yet: less than the pool was written since"
    write(quotas, invented(9), 100 * UNUSED_POOL_SIZES)
    assert use(quotas, HONEST, account) == HONEST and quotas.quota_bytes(HONEST) == 25
    assert quotas.payer(invented(0)) == SHARED and quotas.held_bytes(invented(0)) == 20, "the one that came first went"
    changed: list[bytes] = []
    quotas.on_payer_changed = changed.append
    assert write(quotas, HONEST) == HONEST
    for held in (10, 10):
        quotas.credit(HONEST, held)
    assert quotas.account(HONEST) == HONEST and changed == [], "an empty account has no place, the next writer gets it"
    write(quotas, invented(7))
    assert quotas.payer(invented(7)) == invented(7) and quotas.account(HONEST) == SHARED
    quotas.check_integrity()


def test_accounts_stay_bounded_while_places_change_hands() -> None:
    quotas = TenantQuotas(default_bytes=1, capacity_bytes=1000)
    for number in range(3 * ACCOUNTS_MAX):
        use(quotas, invented(number), write(quotas, invented(number), 20), 20)
    quotas.check_integrity()
    assert len(dict(quotas)) <= 2 * ACCOUNTS_MAX + 1


TENANTS = (NOBODY, NAMED, HONEST, *map(invented, range(5)))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10), st.sampled_from(TENANTS), st.integers(1, 40)), max_size=80),
    st.sampled_from([None, 0, 7, 25]),
    st.sampled_from([None, 30, 100]),
)
def test_any_order_of_writes_uses_ends_and_changes(
    steps: list[tuple[int, bytes, int]], default: int | None, capacity: int | None
) -> None:
    quotas = TenantQuotas({NAMED: 20}, default, capacity)
    blocks: list[tuple[bytes, bytes, int]] = []
    for step, tenant, size in steps:
        if step < 6:
            blocks.append((tenant, write(quotas, tenant, size), size))
        elif step < 8 and blocks:
            owner, account, held = blocks.pop(size % len(blocks))
            blocks.append((owner, use(quotas, owner, account, held), held))
        elif step < 10 and blocks:
            quotas.credit(*blocks.pop(size % len(blocks))[1:])
        elif step == 10:
            quotas.set_capacity(size * 3)
            quotas.set_quotas({tenant: size} if size % 2 else {}, (None, 0, 9)[size % 3])
        quotas.check_integrity()
    assert sum(size for _, size in quotas) == sum(size for _, _, size in blocks)


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(-5, 50)), max_size=200), st.integers(0, 60), st.integers(1, 4)
)
def test_the_most_over_is_found(steps: list[tuple[int, int]], above: int, part: int) -> None:
    over, expected = MostOver(), dict[bytes, int]()
    for name, excess in steps:
        account = bytes([name])
        over.set(account, excess)
        expected.pop(account, None)
        if excess > 0:
            expected[account] = excess
        over.check_integrity()
        fit = {a: e for a, e in expected.items() if a[0] % part == 0 and e > above}
        found = over.first(lambda one: one[0] % part == 0, above)
        assert (found is None) == (not fit) and (found is None or fit[found] == max(fit.values()))
        over.check_integrity()
        assert set(over) == expected.keys()
