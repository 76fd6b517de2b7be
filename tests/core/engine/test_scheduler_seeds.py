"""A thousand seeded histories through the rules of `test_scheduler_histories`: quick, and a seed names a failure."""

from __future__ import annotations

import random

import pytest

from penstock.core.config import POLICIES
from tests.core.engine.test_scheduler_histories import ROUTES, Histories

HISTORIES = 1000
STEPS = 60


def run_history(seed: int) -> None:
    chance = random.Random(seed)
    history = Histories()
    history.start(
        policy=chance.choice(POLICIES),
        mode=chance.choice(["penstock", "penstock", "penstock", "coupled"]),
        layerwise=chance.random() < 0.5,
        pages=chance.randint(8, 20),
        slots=chance.randint(2, 12),
        window=chance.randint(1, 4),
        running=chance.randint(1, 5),
    )
    for _ in range(STEPS):
        step = chance.random()
        if step < 0.2:
            history.submit(
                family=chance.randint(0, 2),
                length=chance.randint(1, 30),
                tail=[chance.randint(0, 1) for _ in range(chance.randint(0, 6))],
                new_tokens=chance.randint(1, 9),
                slo=chance.choice([None, chance.uniform(0.01, 4)]),
            )
        elif step < 0.3:
            history.warm_pool(family=chance.randint(0, 2), count=chance.randint(1, 7), route=chance.choice(ROUTES))
        elif step < 0.9:
            if history.pending:
                history.complete(
                    pick=chance.randint(0, 10**6),
                    fails=chance.randint(0, 9),
                    seconds=chance.choice([0.0, 0.0, chance.uniform(0, 0.5)]),
                )
        elif step < 0.94:
            if history.tokens:
                history.cancel(pick=chance.randint(0, 10**6))
        else:
            history.wait(seconds=chance.choice([0.0, chance.uniform(0, 8)]))
        history.integrity()
    history.teardown()


@pytest.mark.slow
def test_a_thousand_seeded_histories() -> None:
    for seed in range(HISTORIES):
        try:
            run_history(seed)
        except BaseException:
            print(f"run_history({seed}) fails")
            raise
