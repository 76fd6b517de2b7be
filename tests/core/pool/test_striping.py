"""Shares add up, ranges are spread, health moves blocks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.pool import striping
from penstock.core.pool.striping import CYCLE_BLOCKS, Placement, shares, spread

WEIGHTS = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=6)


@given(WEIGHTS, st.integers(0, 5000))
def test_shares_add_up_and_stay_within_one_block(weights: list[float], blocks: int) -> None:
    result = shares(weights, blocks)
    assert sum(result) == blocks
    for weight, share in zip(weights, result, strict=True):
        assert abs(share - blocks * weight / sum(weights)) < 1 + 1e-6


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any))
def test_every_beginning_is_within_one_block_of_its_share(counts: list[int]) -> None:
    order = spread(counts)
    total = sum(counts)
    assert [order.count(i) for i in range(len(counts))] == counts
    given_blocks = [0] * len(counts)
    for step, member in enumerate(order, start=1):
        given_blocks[member] += 1
        for i, count in enumerate(counts):
            assert abs(given_blocks[i] - count * step / total) < 1


@given(WEIGHTS, st.integers(-5000, 5000), st.integers(1, 100))
def test_any_range_of_a_prefix_is_on_all_members(weights: list[float], start: int, length: int) -> None:
    placement = Placement(weights)
    exact = [count / CYCLE_BLOCKS for count in shares(weights, CYCLE_BLOCKS)]
    owners = [placement.owner(position) for position in range(start, start + length)]
    for i, share in enumerate(exact):
        assert abs(owners.count(i) - share * length) < 2


@given(WEIGHTS, st.integers())
def test_order_names_every_weighted_member_once_and_its_owner_first(weights: list[float], position: int) -> None:
    placement = Placement(weights)
    order = placement.order(position)
    assert order[0] == placement.owner(position)
    assert sorted(order) == list(range(len(weights)))


def test_two_to_one_alternates() -> None:
    placement = Placement([2.0, 1.0])
    owners = [placement.owner(i) for i in range(12)]
    assert all(owners[i : i + 3].count(0) == 2 for i in range(10))


def test_fenced_member_gets_nothing_and_comes_back() -> None:
    placement = Placement([1.0, 1.0, 2.0])
    placement.set_health(2, False)
    assert {placement.owner(i) for i in range(50)} == {0, 1}
    assert all(2 not in placement.order(i) for i in range(5))
    placement.set_health(0, False)
    placement.set_health(1, False)
    assert placement.order(3) == [] and placement.owner(3) is None
    placement.set_health(2, True)
    assert placement.order(3) == [2]


def test_a_weight_that_changes_moves_the_share_and_a_new_member_gets_one() -> None:
    placement = Placement([1.0, 1.0])
    placement.set_weight(0, 0.25)
    owners = [placement.owner(i) for i in range(CYCLE_BLOCKS)]
    assert owners.count(0) == CYCLE_BLOCKS // 5 and placement.weights == (0.2, 0.8)
    assert placement.add(1.25) == 2
    owners = [placement.owner(i) for i in range(CYCLE_BLOCKS)]
    assert [owners.count(i) for i in range(3)] == [84, 336, 420]
    placement.set_weight(2, 0.0)
    placement.set_weight(1, 0.0)
    assert {placement.owner(i) for i in range(20)} == {0}
    placement.set_weight(0, 0.0)
    assert placement.owner(0) is None and placement.order(5) == [] and [*placement.weights] == [0.0] * 3
    for refused in (lambda: placement.set_weight(0, -1.0), lambda: placement.add(-1.0)):
        with pytest.raises(ValueError, match="at least 0"):
            refused()


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0]])
def test_impossible_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights are"):
        Placement(weights)


def test_hundreds_of_members_are_planned_once_and_only_when_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each plan of 256 members took 0.1 s: a union of 256 nodes, which places by slots and needs none, made 257."""
    planned: list[int] = []

    def counted(counts: Sequence[int]) -> list[int]:
        planned.append(len(counts))
        return spread(counts)

    monkeypatch.setattr(striping, "spread", counted)
    placement = Placement([1.0] * 50)
    for member in range(50):
        placement.set_weight(member, 2.0)
    placement.set_health(7, False)
    placement.add(2.0)
    assert placement.weights[0] == pytest.approx(1 / 51) and not planned
    assert placement.owner(0) in placement.taking and placement.order(0) and planned == [51]
    placement.set_health(7, True)
    assert placement.rank(840, 7) > 0 and planned == [51, 51]
