"""Agent trajectories as token counts: what each turn sends, what storage holds of it, and what it generates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from penstock.core.cost import ComputeCost
from penstock.workloads.generators import Session, agent_lengths
from penstock.workloads.traces import Scaling, read_trace

BLOCK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One agent, turn by turn. `hits` are whole blocks of the same trajectory's earlier turns, and leave at least one
    token of the prompt to compute; `thinks_s` is the pause before each turn."""

    prompts: list[int]
    hits: list[int]
    answers: list[int]
    thinks_s: list[float] | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """A workload's total demand; sums over every turn of every trajectory."""

    requests: int
    prompt_tokens: int
    hit_tokens: int
    answer_tokens: int
    compute_s: float  # of all missed tokens on one GPU


def from_table(length: str, seed: int, trajectories: int = 500) -> list[Trajectory]:
    """Trajectories with the means of DualPath's table (`length` 32K, 48K or 64K). A prompt is the whole context and the
    append; exactly the recorded number of tokens is generated; no tool latency; hits only within a trajectory."""
    made = []
    for agent in agent_lengths(length, trajectories, seed):
        prompts, hits = [], []
        context = 0
        for append, answer in zip(agent.appends, agent.answers, strict=True):
            prompts.append(context + append)
            hits.append(context // BLOCK_TOKENS * BLOCK_TOKENS)
            context += append + answer
        made.append(Trajectory(prompts, hits, agent.answers))
    return made


def from_trace(path: Path, context_tokens_max: int, think_s_max: float = 0.0) -> list[Trajectory]:
    """Recorded sessions as trajectories; a hit is the longest run of leading blocks seen before in the same session.
    Raises TraceError."""
    workload = read_trace(path, Scaling(context_tokens_max=context_tokens_max, think_s_max=think_s_max))
    return [_from_session(session) for session in workload.sessions]


def _from_session(session: Session) -> Trajectory:
    seen: set[int] = set()
    prompts, hits, thinks = [], [], []
    for turn in session.turns:
        prefix, hit, tokens, running = 0, 0, 0, True
        for segment in turn.prompt:
            prefix = hash((prefix, segment.stream, segment.start, segment.length))
            tokens += segment.length
            running = running and prefix in seen
            if running:
                hit = tokens
            seen.add(prefix)
        prompts.append(tokens)
        hits.append(min(hit, tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS)
        thinks.append(turn.think_s)
    return Trajectory(prompts, hits, [turn.max_tokens for turn in session.turns], thinks)


def load_of(trajectories: Sequence[Trajectory], cost: ComputeCost) -> Load:
    """Sums over all turns."""
    prompts = np.concatenate([t.prompts for t in trajectories]).astype(float)
    hits = np.concatenate([t.hits for t in trajectories]).astype(float)
    misses = prompts - hits
    compute = cost.a + misses * (cost.b + cost.c * (hits + misses / 2))
    answers = sum(sum(t.answers) for t in trajectories)
    return Load(len(prompts), int(prompts.sum()), int(hits.sum()), answers, float(compute.sum()))
