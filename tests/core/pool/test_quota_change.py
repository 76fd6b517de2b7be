"""Quotas that change while tenants hold bytes: who is over follows at once, and accounts stay counted right."""

from __future__ import annotations

import pytest

from penstock.core.pool.quota import ACCOUNTS_MAX, TenantQuotas

A, B = b"a" * 8, b"b" * 8


def test_who_is_over_follows_the_quotas() -> None:
    quotas = TenantQuotas({A: 100}, default_bytes=50)
    quotas.charge(A, 80)
    quotas.charge(B, 40)
    assert quotas.over == set()
    quotas.set_quotas({B: 30}, 60)
    assert quotas.over == {A, B} and quotas.excess_bytes(A) == 20 and quotas.excess_bytes(B) == 10
    quotas.check_integrity()
    quotas.set_quotas({}, None)
    assert quotas.over == set() and dict(quotas) == {A: 80, B: 40}
    with pytest.raises(ValueError, match="-1 bytes"):
        quotas.set_quotas({A: -1}, None)
    quotas.check_integrity()


def test_tenants_that_lose_their_quota_do_not_crowd_out_others() -> None:
    named = {number.to_bytes(8, "little"): 10 for number in range(1, 10)}
    quotas = TenantQuotas(named)
    for account in named:
        quotas.charge(account, 5)
    for number in range(1000, 1000 + ACCOUNTS_MAX + 5):
        tenant = number.to_bytes(8, "little")
        quotas.charge(quotas.account(tenant), 1)
    quotas.set_quotas({}, 3)
    quotas.check_integrity()
    assert named.keys() <= quotas.over
