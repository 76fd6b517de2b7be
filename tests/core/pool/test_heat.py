"""Heat of blocks against the sum that HEAT-1 states, over random histories of reads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.pool.heat import HALF_LIFE_S, HOT_READS, ReadHeat
from tests.pool.helpers import key_of

KEYS = [key_of(at) for at in range(6)]
READS = st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=6, unique=True), st.floats(0, 200)), max_size=40)


@given(READS)
def test_heat_is_the_sum_of_decayed_reads_and_hot_from_the_limit_on(reads: list[tuple[list[int], float]]) -> None:
    heat, now_s = ReadHeat(), 0.0
    seen: list[tuple[int, float]] = []
    for some, pause_s in reads:
        now_s += pause_s
        seen += [(one, now_s) for one in some]
        hot = heat.read([KEYS[one] for one in some], now_s)
        for at, one in enumerate(some):
            expected = sum(0.5 ** ((now_s - then_s) / HALF_LIFE_S) for other, then_s in seen if other == one)
            assert heat.heat(KEYS[one], now_s) == pytest.approx(expected)
            if abs(expected - HOT_READS) > 1e-6:
                assert (at in hot) == (expected > HOT_READS)


@given(st.lists(st.lists(st.integers(0, 30), max_size=8, unique=True), max_size=30), st.integers(1, 8))
def test_the_blocks_read_last_are_counted(reads: list[list[int]], capacity: int) -> None:
    heat = ReadHeat(capacity)
    order: dict[int, None] = {}
    for number, some in enumerate(reads):
        for one in some:
            order.pop(one, None)
            order[one] = None
        heat.read([key_of(one) for one in some], float(number))
        assert len(heat) <= capacity
    for one in list(order)[-capacity:]:
        assert heat.heat(key_of(one), float(len(reads))) > 0


def test_three_reads_in_half_a_minute_are_hot_and_one_a_minute_is_not() -> None:
    heat = ReadHeat()
    assert [heat.read(KEYS[:1], at) for at in (0.0, 15.0, 30.0)] == [[], [], [0]]
    assert all(not heat.read(KEYS[1:2], 60.0 * at) for at in range(200))
    assert [heat.read(KEYS[2:3], 40.0 * at) for at in range(200)][-1] == [0]
