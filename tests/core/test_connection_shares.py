"""Who may be connected, and who leaves for a newcomer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.connection_limits import SMALL_BUDGET, ConnectionLimits, ConnectionShares, network_of


def test_the_oldest_stranger_of_the_address_with_the_most_leaves() -> None:
    shares: ConnectionShares[str] = ConnectionShares(ConnectionLimits(4, 4, 4))
    assert [shares.came(who, where) for who, where in (("a", "x"), ("b", "y"), ("c", "y"), ("d", "x"))] == [None] * 4
    assert shares.came("e", "y") == "a", "both have two; the address that came first has to give one"
    assert shares.came("f", "z") == "b" and shares.came("g", "z") == "c"
    assert {"d", "e", "f", "g"} == set(shares.everybody())
    assert shares.proved("b") == "the connection is ended"


def test_strangers_take_no_place_of_a_peer_and_are_none_once_they_have_proved() -> None:
    shares: ConnectionShares[int] = ConnectionShares(ConnectionLimits(2, 3, 3))
    for number in range(3):
        shares.came(number, "x")
        assert shares.proved(number) is None and shares.proved(number) is None
    assert (shares.peers, shares.strangers) == (3, 0)
    assert [shares.came(number, "x") for number in (10, 11, 12)] == [None, None, 10]
    assert shares.proved(11) == "has 3 connections, the limit"
    shares.left(0)
    assert shares.proved(11) is None
    assert [shares.displaced(), shares.displaced()] == [12, None]


def test_an_address_has_a_share_of_the_peers() -> None:
    shares: ConnectionShares[int] = ConnectionShares(ConnectionLimits(8, 4, 2))
    for number in range(4):
        shares.came(number, "x")
    assert [shares.proved(number) for number in (0, 1)] == [None, None]
    assert shares.proved(2) == "has 2 connections of address x, the limit for one address"
    shares.came(9, "y")
    assert shares.proved(9) is None
    shares.left(1)
    assert shares.proved(2) is None


@given(st.lists(st.tuples(st.sampled_from(["came", "proved", "left"]), st.integers(0, 12), st.integers(0, 3))))
def test_every_history_keeps_the_limits(steps: list[tuple[str, int, int]]) -> None:
    shares: ConnectionShares[int] = ConnectionShares(ConnectionLimits(4, 5, 3))
    for what, who, where in steps:
        if what == "came" and who not in shares:
            shares.came(who, str(where))
        elif what == "proved":
            shares.proved(who)
        elif what == "left":
            shares.left(who)
        shares.check_integrity()
    for who in shares.everybody():
        shares.left(who)
    shares.check_integrity()
    assert not shares.everybody() and not shares.strangers


def test_limits_follow_from_the_open_files() -> None:
    assert ConnectionLimits.within(1 << 20, 512, 1024) == ConnectionLimits(512, 1024, 512)
    assert ConnectionLimits.within(1024, 512, 1024) == ConnectionLimits(128, 256, 128)
    assert ConnectionLimits.within(1 << 20, 512, SMALL_BUDGET) == ConnectionLimits(512, SMALL_BUDGET, SMALL_BUDGET)
    assert ConnectionLimits.within(1 << 20, 512, 1024, 2000).peers_per_address == 1024
    assert ConnectionLimits.within(3, 512, 1024) == ConnectionLimits(1, 1, 1)
    with pytest.raises(ValueError, match="peers is 0; allowed: at least 1"):
        ConnectionLimits(1, 0, 1)


@pytest.mark.parametrize(
    ("host", "source"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("::1", "::/64"),
        ("2001:DB8:0:12:1:2:3:4", "2001:db8:0:12::/64"),
        ("2001:db8:0:12::4", "2001:db8:0:12::/64"),
        ("2001:db8::12:1:2:3:4", "2001:db8:0:12::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("?", "?"),
    ],
)
def test_an_ipv6_network_of_64_bits_is_one_source(host: str, source: str) -> None:
    assert network_of(host) == source
