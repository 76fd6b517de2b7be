"""The agents of `benchmarks dualpath`: some consecutive turns of each trajectory; the pool holds the earlier
context."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.sim.trajectories import Trajectory
from penstock.workloads.generators import Prompt, Session, agent_trajectories, prompt_tokens
from penstock.workloads.traces import Scaling, read_trace

BLOCK_TOKENS = 64
ANSWER_TOKENS_MAX = 64  # there are so few turns that one long answer would dominate the job's time
CONTEXT_TOKENS_MIN = 512  # of a trace's turns; shorter contexts give little to load


@dataclass(frozen=True, slots=True)
class AgentTurn:
    """One turn. `hit_tokens`: whole blocks that earlier turns of the agent have computed."""

    prompt: list[int]
    hit_tokens: int
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class Agent:
    """Turns that follow each other without pause; the pool holds the first turn's `hit_tokens` at the start."""

    name: str
    turns: list[AgentTurn]


def generated(length: str, agents: int, turns: int, token_divisor: int, seed: int, vocabulary: int) -> list[Agent]:
    """Agents of a row of DualPath's table, all lengths divided; turns around the middle of each trajectory, where the
    context is about the row's mean."""
    workload = agent_trajectories(
        length, agents, seed, token_divisor=token_divisor, answer_tokens_max=ANSWER_TOKENS_MAX
    )
    made = []
    for session in workload.sessions:
        first = max(1, min(len(session.turns) // 2, len(session.turns) - turns))
        made.append(_stretch(session, first, turns, vocabulary, None))
    return made


def recorded(
    path: Path, agents: int, turns: int, token_divisor: int, context_tokens_max: int, seed: int, vocabulary: int
) -> list[Agent]:
    """Turns of recorded sessions, each from a random turn on; sessions are reused, from other turns and with other
    tokens, until there are enough. Raises TraceError."""
    scaling = Scaling(
        token_divisor=token_divisor, context_tokens_max=context_tokens_max, answer_tokens_max=ANSWER_TOKENS_MAX
    )
    workload = read_trace(path, scaling)
    rng = random.Random(seed)
    usable = [s for s in workload.sessions if len(s.turns) > turns and _long_enough(s, turns)]
    if not usable:
        raise ValueError(f"{path}: no session has {turns + 1} requests of {CONTEXT_TOKENS_MIN} tokens or more")
    made = []
    for number in range(agents):
        session = usable[number % len(usable)]
        firsts = _long_enough(session, turns)
        made.append(_stretch(session, rng.choice(firsts), turns, vocabulary, number))
    return made


def _long_enough(session: Session, turns: int) -> list[int]:
    """The turns where an agent may begin."""
    return [
        first
        for first in range(1, len(session.turns) - turns + 1)
        if all(turn.prompt_tokens >= CONTEXT_TOKENS_MIN for turn in session.turns[first - 1 : first + turns])
    ]


def _stretch(session: Session, first: int, turns: int, vocabulary: int, copy: int | None) -> Agent:
    """`turns` turns from number `first` on. A `copy` has shifted tokens, so that copies share nothing."""
    shift = 0 if copy is None else (copy + 1) * 7919

    def tokens(prompt: Prompt) -> list[int]:
        plain = prompt_tokens(prompt, vocabulary)
        return plain if not shift else [(token + shift) % (vocabulary - 16) + 16 for token in plain]

    chosen = session.turns[first - 1 : first + turns]
    prompts = [tokens(turn.prompt) for turn in chosen]
    made = []
    for number, turn in enumerate(chosen[1:], start=1):
        shared = max(_shared(prompts[earlier], prompts[number]) for earlier in range(number))
        hit = min(shared, len(prompts[number]) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        made.append(AgentTurn(prompts[number], hit, max(2, turn.max_tokens)))
    return Agent(f"{session.name}-{first}-{copy}", made)


def _shared(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of tokens that two prompts have in common at their beginning."""
    size = min(len(left), len(right))
    if left[:size] == right[:size]:
        return size
    return next(i for i in range(size) if left[i] != right[i])


def trajectories(agents: Sequence[Agent]) -> list[Trajectory]:
    """The same agents as token counts, for the simulator."""
    return [
        Trajectory(
            [len(turn.prompt) for turn in agent.turns],
            [turn.hit_tokens for turn in agent.turns],
            [turn.answer_tokens for turn in agent.turns],
        )
        for agent in agents
    ]
