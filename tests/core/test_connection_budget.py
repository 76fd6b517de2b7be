"""The budget of connections: its bounds hold whatever happens, and whoever serves a request stays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.connection_limits import ConnectionBudget, network_of

STEP = st.tuples(st.sampled_from(["open", "serve", "wait", "close", "room"]), st.integers(0, 40), st.integers(0, 3))


@given(st.integers(1, 12), st.integers(1, 6), st.lists(STEP, max_size=200))
def test_bounds_hold_and_nobody_is_closed_while_serving(
    total: int, share: int, steps: list[tuple[str, int, int]]
) -> None:
    budget = ConnectionBudget(total, share)
    serving: set[int] = set()
    open_: dict[int, int] = {}
    serial = 0
    for action, pick, address in steps:
        one = sorted(open_)[pick % len(open_)] if open_ else -1
        closing: list[int] = []
        if action == "open":
            serial += 1
            found = budget.opened(serial, str(address))
            if found is None:
                assert len(open_) >= total and serving == set(open_)
                continue
            open_[serial] = address
            closing = found
        elif action == "serve":
            budget.serves(one)
            serving |= {one} & set(open_)
        elif action == "wait":
            serving.discard(one)
            closing = budget.waits(one)
        elif action == "close":
            budget.closed(one)
            open_.pop(one, None)
            serving.discard(one)
        else:
            closing = budget.make_room()
        assert not set(closing) & serving
        for gone in closing:
            assert gone in open_
            if pick % 2:  # some are gone at once, some later
                budget.closed(gone)
            del open_[gone]
        budget.check_integrity()
        assert budget.open == len(open_) and budget.waiting == len(open_) - len(serving)


def test_the_longest_waiting_of_the_same_address_goes_first() -> None:
    budget = ConnectionBudget(10, 2)
    assert budget.opened(1, "b") == [] and budget.opened(2, "a") == [] and budget.opened(3, "a") == []
    assert budget.opened(4, "a") == [2]
    budget.serves(3)
    assert budget.opened(5, "a") == [] and budget.waits(3) == [4]
    full = ConnectionBudget(2, 2)
    full.opened(1, "a")
    full.opened(2, "b")
    assert full.opened(3, "c") == [1] and full.make_room() == [2]
    full.serves(3)
    full.closed(1)
    full.closed(2)
    full.opened(4, "a")
    full.serves(4)
    assert full.opened(5, "a") is None


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8:0:0:ffff::2", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("local", "local"),
    ],
)
def test_addresses_of_one_customer_count_as_one(address: str, network: str) -> None:
    assert network_of(address) == network


def test_a_budget_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ConnectionBudget(0, 1)
