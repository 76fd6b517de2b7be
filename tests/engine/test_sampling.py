"""Sampling: the distribution it draws from, and that a seed and an index name one draw."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from penstock.engine.runner import SamplingParams
from penstock.engine.sampling import sample, uniform_draw

LOGITS = torch.log(torch.tensor([0.05, 0.5, 0.3, 0.15]))


def draws(params: SamplingParams, count: int = 2000) -> Counter[int | None]:
    rows = LOGITS.expand(count, -1)
    return Counter(sample(rows, [params] * count, range(count)))


def test_greedy_is_the_largest_logit() -> None:
    rows = torch.stack((LOGITS, LOGITS.flip(0)))
    assert sample(rows, [SamplingParams(temperature=0.0)] * 2, [0, 0]) == [1, 2]


def test_frequencies_follow_the_probabilities() -> None:
    seen = draws(SamplingParams(temperature=1.0, seed=5), 4000)
    for token, probability in enumerate(LOGITS.exp().tolist()):
        sigma = math.sqrt(probability * (1 - probability) / 4000)
        assert abs(seen[token] / 4000 - probability) < 5 * sigma


def test_temperature_sharpens() -> None:
    assert draws(SamplingParams(temperature=0.25, seed=1))[1] / 2000 > 0.85
    assert set(draws(SamplingParams(temperature=1e-3, seed=1))) == {1}


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        (SamplingParams(top_k=1, seed=0), {1}),
        (SamplingParams(top_k=2, seed=0), {1, 2}),
        (SamplingParams(top_k=99, seed=0), {0, 1, 2, 3}),
        (SamplingParams(top_p=0.4, seed=0), {1}),
        (SamplingParams(top_p=0.7, seed=0), {1, 2}),
        (SamplingParams(top_p=0.9, seed=0), {1, 2, 3}),
        (SamplingParams(top_p=0.0, seed=0), {1}),
        (SamplingParams(top_k=2, top_p=0.99, seed=0), {1, 2}),
    ],
)
def test_truncation_keeps_the_head_of_the_distribution(params: SamplingParams, allowed: set[int]) -> None:
    assert set(draws(params)) == allowed


def test_a_seed_and_an_index_name_one_draw_whatever_else_is_in_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 50, generator=generator)
    seeded = SamplingParams(temperature=1.5, seed=42)
    alone = [sample(rows[:1], [seeded], [index])[0] for index in range(30)]
    others = [SamplingParams(temperature=0.0), SamplingParams(seed=None), SamplingParams(seed=7, top_p=0.5)]
    for index, token in enumerate(alone):
        assert sample(rows[:4], [seeded, *others], [index, 0, 0, 0])[0] == token
    assert len(set(alone)) > 5
    assert sample(rows[:1], [SamplingParams(temperature=1.5, seed=43)], [0]) != [] and uniform_draw(
        42, 0
    ) != uniform_draw(43, 0)


def test_without_a_seed_draws_differ() -> None:
    assert len({uniform_draw(None, 0) for _ in range(8)}) == 8
    assert all(0 <= uniform_draw(seed, 0) < 1 for seed in range(200))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_no_distribution_has_no_token_and_others_have_theirs(temperature: float) -> None:
    rows = torch.stack((LOGITS, LOGITS.clone(), LOGITS.clone(), torch.full_like(LOGITS, float("-inf")), LOGITS))
    rows[1, 2] = float("nan")
    rows[2, 2] = float("inf")
    params = SamplingParams(temperature=temperature, seed=4)
    alone = sample(LOGITS[None], [params], [3])
    assert alone != [None]
    assert sample(rows, [params] * 5, [3] * 5) == [*alone, None, None, None, *alone]


def test_counts_must_agree() -> None:
    with pytest.raises(ValueError, match="1 rows of logits, 2 parameters"):
        sample(LOGITS[None], [SamplingParams()] * 2, [0, 0])
