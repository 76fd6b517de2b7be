"""Heat of blocks against the sum that HEAT-1 states, over random histories of reads."""

from __future__ import annotations

import numpy as np
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
            assert heat.heat(KEYS[one], now_s) == pytest.approx(expected, rel=1e-5)
            if abs(expected - HOT_READS) > 1e-4:
                assert (at in hot) == (expected > HOT_READS)


def test_few_of_many_blocks_that_are_read_once_are_taken_for_hot_and_memory_does_not_grow() -> None:
    heat, generator = ReadHeat(), np.random.default_rng(3)
    hot = 0
    for now_s in range(0, 300, 6):  # 10^5 within a half-life
        keys = [bytes(key) for key in generator.integers(0, 256, (10_000, 16), np.uint8)]
        hot += len(heat.read(keys, float(now_s)))
    assert hot < 500_000 / 1000


def test_three_reads_in_half_a_minute_are_hot_and_one_a_minute_is_not() -> None:
    heat = ReadHeat()
    assert [heat.read(KEYS[:1], at) for at in (0.0, 15.0, 30.0)] == [[], [], [0]]
    assert all(not heat.read(KEYS[1:2], 60.0 * at) for at in range(200))
    assert [heat.read(KEYS[2:3], 40.0 * at) for at in range(200)][-1] == [0]
