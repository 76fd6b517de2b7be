"""Deadlines: the fit finds known coefficients, reuse follows prefixes, multipliers are drawn once."""

from __future__ import annotations

import numpy as np
import pytest

from penstock.workloads.deadlines import TtftModel, deadlines_s, one_at_a_time, reusable_tokens, with_multipliers
from penstock.workloads.generators import Segment, Session, Turn, Workload, agent_trajectories
from penstock.workloads.replay import RequestRecord


def _record(cached: int, query: int, ttft_s: float | None, error: str | None = None) -> RequestRecord:
    return RequestRecord("s", 0, 0.0, cached + query, ttft_s, 1.0, (), cached, None, error, None)


def _true_ttft_s(cached: int, query: int) -> float:
    return 0.01 + 1e-4 * cached + 1e-3 * query + 2e-8 * query * (cached + query / 2)


def test_fit_finds_the_coefficients() -> None:
    rng = np.random.default_rng(0)
    cases = [(int(rng.integers(0, 3000)), int(rng.integers(1, 800))) for _ in range(30)]
    records = [_record(c, q, _true_ttft_s(c, q)) for c, q in cases]
    model = TtftModel.fit([*records, _record(1, 1, None, "failed")])
    for cached, query in ((0, 500), (2000, 50), (3000, 800)):
        assert model.ttft_s(cached, query) == pytest.approx(_true_ttft_s(cached, query), rel=0.01)
    assert model.ttft_s(0, 1) >= min(record.ttft_s or 0 for record in records)


def test_fit_has_no_negative_terms_under_noise() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        records = [
            _record(int(c), int(q), float(0.05 + 1e-4 * q) * float(rng.uniform(0.5, 2)))
            for c, q in zip(rng.integers(0, 2000, 12), rng.integers(10, 500, 12), strict=True)
        ]
        model = TtftModel.fit(records)
        assert min(model.fixed_s, model.cached_s, model.query_s, model.attention_s) >= 0
        assert model.ttft_s(4000, 1000) > 0


def test_too_few_calibration_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 calibration requests succeeded; 4 are needed"):
        TtftModel.fit([_record(1, 1, 0.1), _record(1, 1, None, "failed")])


def _turn(*segments: tuple[str, int]) -> Turn:
    return Turn(tuple(Segment(name, length) for name, length in segments), 4)


def test_reusable_tokens_are_full_blocks_seen_before() -> None:
    first = Session("a", (_turn(("shared", 32), ("a", 30)), _turn(("shared", 32), ("a", 50))))
    second = Session("b", (_turn(("shared", 32), ("b", 30)), _turn(("shared", 32))))
    other_tenant = Session("c", (_turn(("shared", 32), ("a", 30)),), tenant="t")
    found = reusable_tokens(Workload("w", (first, second, other_tenant)), 384, 16)
    assert found == {("a", 0): 0, ("b", 0): 32, ("c", 0): 0, ("a", 1): 48, ("b", 1): 31}


def test_deadlines_are_multiples_of_the_model() -> None:
    work = with_multipliers(agent_trajectories("32K", 4, 0, token_divisor=64, turns_max=4), seed=3)
    assert work == with_multipliers(work, seed=4)  # what is set stays
    multipliers = {turn.slo_multiplier for session in work.sessions for turn in session.turns}
    assert multipliers <= {2.0, 4.0, 8.0} and len(multipliers) > 1
    reusable = reusable_tokens(work, 384, 16)
    model = TtftModel(0.1, 0.0, 0.001, 0.0, 0.0)
    found = deadlines_s(work, reusable, model)
    assert len(found) == work.requests
    session = work.sessions[2]
    turn = session.turns[1]
    query = turn.prompt_tokens - reusable[session.name, 1]
    assert turn.slo_multiplier is not None
    assert found[session.name, 1] == pytest.approx(turn.slo_multiplier * (0.1 + 0.001 * query))


def test_one_at_a_time_takes_turns_between_short_and_long_sessions() -> None:
    sessions = tuple(Session(f"s{i}", tuple(_turn((f"s{i}", 100 * (i + 1) + t)) for t in range(5))) for i in range(8))
    alone = one_at_a_time(Workload("w", sessions), 10, 4)
    assert len(alone.sessions) == 1
    names = [turn.prompt[0].stream for turn in alone.sessions[0].turns]
    assert names == ["s1", "s3", "s5", "s7"] * 2 + ["s1", "s3"]
    single = Workload("open", tuple(Session(f"s{i}", (_turn((f"s{i}", 10)),)) for i in range(30)))
    assert one_at_a_time(single, 10, 4).requests == 10
