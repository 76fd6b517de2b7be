"""The compute model under batches that are all much alike for long, as a decode engine's are."""

from __future__ import annotations

import random

import pytest

from penstock.core.cost import ComputeCost

BATCHES = 4000
BATCH_S = 2e-3


@pytest.mark.parametrize("seed", range(12))
def test_batches_that_are_alike_leave_sound_costs(seed: int) -> None:
    generator = random.Random(seed)
    cost = ComputeCost(
        generator.choice([0, 1e-3, 3e-3]), generator.choice([0, 1e-5, 1e-4]), generator.choice([0, 1e-9])
    )
    errors = []
    for number in range(BATCHES):
        if generator.random() < 0.05:
            spans = [(generator.randrange(8, 25), 64)]
        else:
            spans = [(1, generator.randrange(64, 100)) for _ in range(generator.choice((1, 1, 2, 3)))]
        slow = 30 if generator.random() < 0.02 else 1
        seconds = BATCH_S * (1 + 0.3 * generator.random()) * slow
        if number > 100 and slow == 1:
            errors.append(abs(cost.seconds(spans) - seconds) / seconds)
        cost.observe(spans, seconds)
        assert cost.seconds([(2048, 4096)]) < 1e6, f"after {number} batches: {cost}"
    errors.sort()
    assert errors[len(errors) // 2] < 0.2 and errors[len(errors) * 95 // 100] < 1.0
