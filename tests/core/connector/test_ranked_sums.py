"""Sums by rank of a treap, beside sums over a list."""

from __future__ import annotations

import random
from functools import partial

import pytest

from penstock.core.connector.ranked_sums import RankedSums
from penstock.core.ordering import Rank
from penstock.sim.commands.cost import bytecodes


def plain_sums(members: dict[Rank, dict[str, int]], rank: Rank) -> dict[str, int]:
    total: dict[str, int] = {}
    for other, amounts in members.items():
        if other <= rank:
            for name, amount in amounts.items():
                total[name] = total.get(name, 0) + amount
    return {name: amount for name, amount in total.items() if amount}


def dearest(sums: RankedSums[str], ranks: list[Rank]) -> int:
    """Bytecodes of the question that costs most."""
    return max(bytecodes(partial(sums.up_to, rank)) for rank in ranks)


@pytest.mark.parametrize("seed", range(20))
def test_sums_are_those_of_a_plain_list(seed: int) -> None:
    dice = random.Random(seed)
    sums: RankedSums[str] = RankedSums()
    members: dict[Rank, dict[str, int]] = {}
    for sequence in range(300):
        action = dice.random()
        amounts = {name: dice.randint(0, 3) << dice.choice([0, 70]) for name in dice.sample("abcd", dice.randint(0, 4))}
        if action < 0.5 or not members:
            rank = (dice.randint(0, 2), dice.choice([0.5, 1.0, dice.random()]), sequence)
            sums.add(rank, amounts)
            members[rank] = amounts
        elif action < 0.7:
            rank = dice.choice(list(members))
            sums.remove(rank)
            del members[rank]
        else:
            rank = dice.choice(list(members))
            sums.change(rank, amounts)
            members[rank] = amounts
        for asked in [*dice.sample(sorted(members), min(3, len(members))), (1, 0.7, 0)]:
            assert sums.up_to(asked) == plain_sums(members, asked)
        assert len(sums) == len(members)


@pytest.mark.parametrize("order", ["rising", "falling", "any"])
def test_a_path_is_logarithmic_in_every_order(order: str) -> None:
    ranks: list[Rank] = [(1, float(number), number) for number in range(4000)]
    if order == "falling":
        ranks.reverse()
    elif order == "any":
        random.Random(1).shuffle(ranks)
    sums: RankedSums[str] = RankedSums()
    for rank in ranks:
        sums.add(rank, {"a": 1})
    assert dearest(sums, ranks[::40]) < 100 * 40, "more than 40 levels of 100 bytecodes"
    for rank in ranks[::2]:
        sums.remove(rank)
    assert dearest(sums, ranks[::40]) < 100 * 40 and sums.up_to((9, 0.0, 0)) == {"a": 2000}
