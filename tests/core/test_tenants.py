"""A tenant and a salt within it: different pairs never share KV, and quotas see the tenant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.tenants import tenant_and_salt, tenant_of

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=4)


@given(st.lists(st.tuples(NAMES.filter(bool), NAMES), max_size=30))
def test_no_two_pairs_are_one(pairs: list[tuple[str, str]]) -> None:
    assert len({tenant_and_salt(*pair) for pair in pairs}) == len(set(pairs))
    assert all(tenant_of(tenant_and_salt(*pair)) == pair[0] for pair in pairs)


@given(NAMES)
def test_without_keys_the_salt_is_the_tenant(salt: str) -> None:
    assert tenant_and_salt("", salt) == salt == tenant_of(tenant_and_salt("", salt))


@pytest.mark.parametrize("pair", [("a\0", ""), ("", "a\0b"), ("a", "\0")])
def test_nobody_writes_the_separator(pair: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="code 0"):
        tenant_and_salt(*pair)
