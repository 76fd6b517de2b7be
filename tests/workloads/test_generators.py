"""Generators: means of the papers' tables, shared prefixes, and one workload per seed on every machine."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from penstock.workloads.generators import (
    AGENT_TABLES,
    CALVO_DATASETS,
    RESERVED_TOKEN_IDS,
    SLO_MULTIPLIERS,
    Segment,
    Workload,
    agent_trajectories,
    calvo,
    prompt_tokens,
    stream_tokens,
)


def test_stream_tokens_are_fixed_and_avoid_special_ids() -> None:
    tokens = stream_tokens("a", 0, 1000, 384)
    assert tokens[:4] == stream_tokens("a", 0, 4, 384)
    assert tokens[600:1000] == stream_tokens("a", 600, 400, 384)
    assert tokens != stream_tokens("b", 0, 1000, 384)
    assert min(tokens) >= RESERVED_TOKEN_IDS and max(tokens) < 384
    assert len(set(tokens)) > 300
    assert stream_tokens("a", 0, 0, 384) == []


def test_vocabulary_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocabulary is 16; it must be above 16"):
        stream_tokens("a", 0, 1, 16)


_DIGEST = """
import hashlib
from penstock.workloads.generators import agent_trajectories, calvo, prompt_tokens
for w in (calvo("icl", 1.0, 7, requests=5), agent_trajectories("32K", 2, 7, token_divisor=16)):
    print(hashlib.sha256(repr(w).encode()).hexdigest(), sum(prompt_tokens(w.sessions[1].turns[0].prompt, 512)))
"""


def test_one_seed_is_one_workload_under_every_hash_seed() -> None:
    answers = {
        subprocess.run(
            [sys.executable, "-c", _DIGEST],
            env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin"},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("0", "1234")
    }
    assert len(answers) == 1
    here = calvo("icl", 1.0, 7, requests=5)
    assert hashlib.sha256(repr(here).encode()).hexdigest() in answers.pop()
    assert calvo("icl", 1.0, 8, requests=5) != here


@pytest.mark.parametrize("dataset", CALVO_DATASETS)
def test_calvo_matches_its_table(dataset: str) -> None:
    row = CALVO_DATASETS[dataset]
    work = calvo(dataset, 1.2, 3)
    turns = [session.turns[0] for session in work.sessions]
    contexts = [turn.prompt[0].length for turn in turns]
    assert work.requests == row.requests
    assert np.mean(contexts) == pytest.approx(row.context_tokens_mean, rel=0.01)
    assert np.mean([turn.prompt[1].length for turn in turns]) == pytest.approx(row.query_tokens_mean, rel=0.02)
    assert 0.2 < np.std(contexts) / np.mean(contexts) < 0.4
    assert all(turn.warm_tokens == turn.prompt[0].length for turn in turns)
    assert {turn.slo_multiplier for turn in turns} == set(SLO_MULTIPLIERS)
    starts_s = [session.start_s for session in work.sessions]
    assert starts_s == sorted(starts_s)
    assert row.requests / starts_s[-1] == pytest.approx(1.2, rel=0.35)


def test_calvo_hit_ratios_are_drawn_from_the_list() -> None:
    work = calvo("icl", 1.0, 0, hit_ratios=(0.25, 0.5, 0.75, 1.0))
    ratios = [s.turns[0].warm_tokens / s.turns[0].prompt[0].length for s in work.sessions]
    for allowed in (0.25, 0.5, 0.75, 1.0):
        assert sum(abs(r - allowed) < 0.01 for r in ratios) > 15


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: calvo("none", 1.0, 0), "dataset is 'none'; allowed are loogle, icl, code"),
        (lambda: calvo("icl", 0.0, 0), "rate_per_s is 0.0"),
        (lambda: agent_trajectories("1K", 1, 0), "length is '1K'; allowed are 32K, 48K, 64K"),
    ],
)
def test_wrong_parameters_are_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()


def _means(work: Workload) -> dict[str, float]:
    last = [session.turns[-1] for session in work.sessions]
    counts = [len(session.turns) for session in work.sessions]
    answers = [sum(turn.max_tokens for turn in session.turns) for session in work.sessions]
    totals = [turn.prompt_tokens + turn.max_tokens for turn in last]
    appends = [(total - answer) / n for total, answer, n in zip(totals, answers, counts, strict=True)]
    contexts = [turn.prompt_tokens for session in work.sessions for turn in session.turns]
    return {
        "turns": float(np.mean(counts)),
        "append_tokens": float(np.mean(appends)),
        "generated_tokens": float(np.mean([a / n for a, n in zip(answers, counts, strict=True)])),
        "total_tokens": float(np.mean(totals)),
        "context_tokens": float(np.mean(contexts)),
    }


@pytest.mark.parametrize("length", AGENT_TABLES)
def test_agent_trajectories_match_their_table(length: str) -> None:
    table = AGENT_TABLES[length]
    work = agent_trajectories(length, 100, 1)
    for name, mean in _means(work).items():
        assert mean == pytest.approx(getattr(table, name), rel=0.05), name
    assert work.context_tokens_max <= table.length_tokens_max


def test_agent_prompts_grow_by_append_and_share_the_system_prompt() -> None:
    work = agent_trajectories("32K", 3, 1, token_divisor=16, turns_divisor=4, shared_prefix_tokens=200)
    first = [prompt_tokens(session.turns[0].prompt, 512)[:200] for session in work.sessions]
    assert first[0] == first[1] == first[2]
    for session in work.sessions:
        previous: tuple[Segment, ...] = ()
        for turn in session.turns:
            assert turn.prompt[: len(previous)] == previous
            previous = turn.prompt
    own = [prompt_tokens(session.turns[0].prompt, 512)[200:] for session in work.sessions]
    assert own[0][:20] != own[1][:20]


def test_scaled_agents_keep_the_size_of_an_append() -> None:
    full = _means(agent_trajectories("32K", 60, 1))
    scaled = _means(agent_trajectories("32K", 60, 1, token_divisor=16, turns_divisor=4))
    assert scaled["turns"] == pytest.approx(full["turns"] / 4, rel=0.05)
    assert scaled["generated_tokens"] == pytest.approx(full["generated_tokens"] / 16, rel=0.1)
    assert all(len(s.turns) <= 5 for s in agent_trajectories("32K", 9, 1, turns_max=5).sessions)
