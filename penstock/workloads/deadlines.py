"""Deadlines of a workload: TTFT without interference, fitted over requests that ran alone, times multipliers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from penstock.core.keys import block_keys
from penstock.workloads.generators import SLO_MULTIPLIERS, Session, Turn, Workload, prompt_tokens
from penstock.workloads.replay import RequestRecord

REQUESTS_MIN = 4
RequestName = tuple[str, int]  # session and turn


@dataclass(frozen=True, slots=True)
class TtftModel:
    """TTFT of a request that runs alone: `fixed_s + cached_s * cached + query_s * (query tokens) + attention_s * query
    * (cached + query / 2)`, no term below zero, never below the smallest measurement."""

    fixed_s: float
    cached_s: float
    query_s: float
    attention_s: float
    least_s: float

    @classmethod
    def fit(cls, records: Sequence[RequestRecord]) -> Self:
        """Least squares over requests that ran one at a time. Raises ValueError if too few of them succeeded."""
        good = [record for record in records if record.error is None and record.ttft_s is not None]
        if len(good) < REQUESTS_MIN:
            raise ValueError(f"{len(good)} of {len(records)} calibration requests succeeded; {REQUESTS_MIN} are needed")
        rows = np.array([_terms(r.cached_tokens, r.prompt_tokens - r.cached_tokens) for r in good])
        ttft_s = np.array([record.ttft_s for record in good], dtype=float)
        fixed, cached, query, attention = (float(x) for x in _nonnegative(rows, ttft_s))
        return cls(fixed, cached, query, attention, least_s=float(ttft_s.min()))

    def ttft_s(self, cached_tokens: int, query_tokens: int) -> float:
        """Seconds to the first token of a request that runs alone; at least `least_s`."""
        weights = (self.fixed_s, self.cached_s, self.query_s, self.attention_s)
        terms = _terms(cached_tokens, query_tokens)
        return max(self.least_s, sum(w * t for w, t in zip(weights, terms, strict=True)))


def _terms(cached: int, query: int) -> tuple[float, float, float, float]:
    return 1.0, float(cached), float(query), query * (cached + query / 2.0)


def _nonnegative(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least squares of relative errors with coefficients that are not negative: negative terms are removed, the most
    negative first."""
    active = list(range(rows.shape[1]))
    found = np.zeros(rows.shape[1])
    while active:
        scale = np.abs(rows[:, active] / values[:, None]).max(axis=0)
        scale[scale == 0] = 1.0
        solution = np.linalg.lstsq(rows[:, active] / values[:, None] / scale, np.ones(len(values)), rcond=None)[0]
        if solution.min() >= 0:
            found[active] = solution / scale
            break
        active.pop(int(np.argmin(solution)))
    return found


def reusable_tokens(workload: Workload, vocabulary: int, block_tokens: int) -> dict[RequestName, int]:
    """Prompt tokens of each request that an unbounded cache would hold: the longest run of full blocks of earlier
    requests, with sessions taking turns. At least one token of a prompt is always computed."""
    seen: set[bytes] = set()
    found: dict[RequestName, int] = {}
    for turn in range(max(len(session.turns) for session in workload.sessions)):
        for session in workload.sessions:
            if turn >= len(session.turns):
                continue
            tokens = prompt_tokens(session.turns[turn].prompt, vocabulary)
            keys = block_keys(tokens, b"reuse", session.tenant, block_tokens)
            hits = next((i for i, key in enumerate(keys) if key not in seen), len(keys))
            found[session.name, turn] = min(hits * block_tokens, len(tokens) - 1)
            seen.update(keys)
    return found


def with_multipliers(workload: Workload, seed: int) -> Workload:
    """The workload with a multiplier drawn evenly from {2, 4, 8} on every turn without one."""
    rng = np.random.default_rng(seed)

    def drawn(turn: Turn) -> Turn:
        pick = float(rng.choice(SLO_MULTIPLIERS))
        return turn if turn.slo_multiplier is not None else replace(turn, slo_multiplier=pick)

    sessions = tuple(replace(s, turns=tuple(drawn(turn) for turn in s.turns)) for s in workload.sessions)
    return replace(workload, sessions=sessions)


def deadlines_s(workload: Workload, reusable: Mapping[RequestName, int], model: TtftModel) -> dict[RequestName, float]:
    """TTFT without interference times the turn's multiplier, for every turn that has one."""
    found = {}
    for session in workload.sessions:
        for i, turn in enumerate(session.turns):
            if turn.slo_multiplier is not None:
                cached = reusable[session.name, i]
                found[session.name, i] = turn.slo_multiplier * model.ttft_s(cached, turn.prompt_tokens - cached)
    return found


def one_at_a_time(workload: Workload, requests_max: int, sessions_max: int) -> Workload:
    """Turns of a few sessions, from short to long ones, in one closed loop. Sessions take turns, so that a small device
    memory evicts a session's KV before its next turn. `sessions_max` does not limit sessions of one turn."""
    depth = max(len(session.turns) for session in workload.sessions)
    count = min(len(workload.sessions), sessions_max if depth > 1 else requests_max)
    by_length = sorted(workload.sessions, key=lambda session: session.turns[0].prompt_tokens)
    sessions = [by_length[(2 * i + 1) * len(by_length) // (2 * count)] for i in range(count)]
    turns: list[Turn] = []
    for i in range(depth):
        turns += [replace(session.turns[i], think_s=0.0) for session in sessions if i < len(session.turns)]
    return Workload(f"{workload.name}-alone", (Session("calibration", tuple(turns[:requests_max])),))
