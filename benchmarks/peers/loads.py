"""The load of `benchmarks vllm`: CALVO's datasets and recorded traces at a scale for two cores, and the model."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from penstock.core.keys import block_keys
from penstock.workloads.deadlines import RequestName, TtftModel, reusable_tokens, with_multipliers
from penstock.workloads.generators import CALVO_DATASETS, Segment, Session, Turn, Workload, calvo, prompt_tokens
from penstock.workloads.traces import Scaling, TraceError, read_trace

DATASETS = tuple(CALVO_DATASETS)
TOKEN_DIVISOR = 16  # of CALVO's contexts and queries
CONTEXT_UNIT_TOKENS = 256  # contexts are whole chunks of LMCache and whole blocks of Penstock
AGENTS, CONVERSATION = "claude_code", "conversation"
AGENT_DIVISOR, CONVERSATION_DIVISOR = 32, 16
AGENT_SESSIONS = 12
AGENT_THINK_S_MAX = 0.5
AGENT_SESSION_EVERY_S = 0.25
ANSWER_TOKENS_MAX = 8
CONVERSATION_UTILISATION = 0.6  # of stock vLLM's compute capacity
CONTEXT_TOKENS_MAX = 4096
REUSE_BLOCK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Geometry:
    """A Llama in float32 whose KV is large relative to its compute: loading a token's KV over the link takes a fraction
    of the time of computing it."""

    hidden: int = 256
    intermediate: int = 768
    layers: int = 8
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    vocabulary: int = 2048

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV of one token, in float32."""
        return 2 * 4 * self.layers * self.kv_heads * self.head_dim

    def describe(self) -> str:
        """The model in one line, for the report's notes."""
        return (
            f"Llama of {self.layers} layers, width {self.hidden} / {self.intermediate}, {self.heads} heads and "
            f"{self.kv_heads} KV heads of {self.head_dim}, float32, random weights: {self.kv_bytes_per_token} B of KV "
            "per token"
        )


def build_model(folder: Path, geometry: Geometry) -> int:
    """Write a checkpoint with random weights; returns the size of its vocabulary."""
    from penstock.testing.tiny_models import build_llama

    sizes = {
        "hidden_size": geometry.hidden,
        "intermediate_size": geometry.intermediate,
        "num_hidden_layers": geometry.layers,
        "num_attention_heads": geometry.heads,
        "num_key_value_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
        "initializer_range": 0.08,
    }
    return build_llama(folder, geometry.vocabulary, 2 * CONTEXT_TOKENS_MAX, sizes)


def dataset(name: str, requests: int, seed: int) -> Workload:
    """One of CALVO's datasets, lengths divided by TOKEN_DIVISOR, contexts in whole CONTEXT_UNIT_TOKENS; all requests at
    once (`arriving` spreads them). `warm_tokens` is the whole context."""
    unit = CONTEXT_UNIT_TOKENS * TOKEN_DIVISOR
    full = calvo(name, float("inf"), seed, requests=requests, context_tokens_multiple=unit)
    sessions = []
    for session in full.sessions:
        context, query = session.turns[0].prompt
        length = min(context.length // TOKEN_DIVISOR, CONTEXT_TOKENS_MAX - CONTEXT_UNIT_TOKENS)
        asked = max(1, round(query.length / TOKEN_DIVISOR))
        prompt = (replace(context, length=length), replace(query, length=asked))
        turn = replace(session.turns[0], prompt=prompt, warm_tokens=length)
        sessions.append(replace(session, turns=(turn,), start_s=0.0))
    return Workload(name, tuple(sessions))


def arriving(workload: Workload, rate_per_s: float, seed: int) -> Workload:
    """The same requests in another order, as a Poisson process."""
    rng = random.Random(f"{workload.name}/{seed}")
    at_s, sessions = 0.0, []
    for session in rng.sample(workload.sessions, len(workload.sessions)):
        at_s += rng.expovariate(rate_per_s)
        sessions.append(replace(session, start_s=at_s))
    return replace(workload, sessions=tuple(sessions))


def contexts_of(workload: Workload) -> Workload:
    """The contexts alone, one after the other, for filling a store."""
    turns = tuple(
        Turn((turn.prompt[0], Segment(f"fill/{session.name}", 1)), 1)
        for session in workload.sessions
        for turn in session.turns
    )
    return Workload(f"{workload.name}-fill", (Session("fill", turns),))


def unique_tokens(fill: Workload, vocabulary: int) -> int:
    """Tokens in whole LMCache chunks that a store holds after these prompts, each counted once."""
    keys: set[bytes] = set()
    for session in fill.sessions:
        for turn in session.turns:
            tokens = prompt_tokens(turn.prompt, vocabulary)
            keys.update(block_keys(tokens, b"fill", session.tenant, CONTEXT_UNIT_TOKENS))
    return len(keys) * CONTEXT_UNIT_TOKENS


def alone(workload: Workload, requests: int) -> Workload:
    """Some of the requests, from short to long ones, one at a time."""
    by_length = sorted(workload.sessions, key=lambda session: session.turns[0].prompt_tokens)
    count = min(requests, len(by_length))
    picked = [by_length[(2 * i + 1) * len(by_length) // (2 * count)] for i in range(count)]
    turns = tuple(replace(session.turns[0], slo_multiplier=None) for session in picked)
    return Workload(f"{workload.name}-alone", (Session("alone", turns),))


def never_seen(requests: int) -> Workload:
    """Prompts that no store holds, from short to long ones, one at a time."""
    lengths = [CONTEXT_TOKENS_MAX * (i + 1) // (2 * requests) for i in range(requests)]
    turns = tuple(Turn((Segment(f"never-seen/{length}", length),), 1) for length in lengths)
    return Workload("never-seen", (Session("alone", turns),))


def warm_tokens(workload: Workload) -> dict[RequestName, int]:
    """What a filled store holds of each prompt; at least one token is computed."""
    return {
        (session.name, i): min(turn.warm_tokens, turn.prompt_tokens - 1)
        for session in workload.sessions
        for i, turn in enumerate(session.turns)
    }


@dataclass(frozen=True, slots=True)
class Trace:
    """A recorded trace at this scale. `reusable`: what an unbounded cache would hold of each prompt. `before`: prompts
    that every store gets first; everything else is cold."""

    workload: Workload
    reusable: Mapping[RequestName, int]
    before: Workload | None = None

    def again(self, run: str) -> Trace:
        """The same requests with other tokens, so that no cache holds anything of an earlier run."""
        return Trace(
            _other_tokens(self.workload, run),
            self.reusable,
            None if self.before is None else _other_tokens(self.before, run),
        )

    @property
    def reuse(self) -> float:
        """Share of all prompt tokens that an unbounded cache would hold."""
        return sum(self.reusable.values()) / self.workload.prompt_tokens


def _other_tokens(workload: Workload, run: str) -> Workload:
    sessions = tuple(
        replace(session, turns=tuple(_renamed(turn, run) for turn in session.turns)) for session in workload.sessions
    )
    return replace(workload, sessions=sessions)


def _renamed(turn: Turn, run: str) -> Turn:
    return replace(turn, prompt=tuple(replace(segment, stream=f"{run}/{segment.stream}") for segment in turn.prompt))


def agents(folder: Path, requests: int, vocabulary: int, seed: int) -> Trace:
    """Coding agents in the middle of their work: closed loops; one session after the other resumes at half of its
    turns. Stores hold the previous turn, as after a pause, so that reuse is that of the whole recording."""
    scaling = Scaling(
        token_divisor=AGENT_DIVISOR,
        time_divisor=8.0,
        think_s_max=AGENT_THINK_S_MAX,
        context_tokens_max=CONTEXT_TOKENS_MAX,
        answer_tokens_max=ANSWER_TOKENS_MAX,
    )
    turns = max(1, requests // AGENT_SESSIONS)
    long = [s for s in read_trace(folder, scaling).sessions if len(s.turns) >= 2 * turns][:AGENT_SESSIONS]
    if not long:
        raise TraceError(f"{folder}: no session has {2 * turns} turns")
    resumed = []
    for number, session in enumerate(long):
        first = len(session.turns) // 2
        window = session.turns[first - 1 : first + turns]
        resumed.append(replace(session, turns=window, start_s=number * AGENT_SESSION_EVERY_S))
    reusable = reusable_tokens(Workload(AGENTS, tuple(resumed)), vocabulary, REUSE_BLOCK_TOKENS)
    workload = Workload(AGENTS, tuple(replace(session, turns=session.turns[1:]) for session in resumed))
    fill = tuple(Turn(session.turns[0].prompt, 1) for session in resumed)
    return Trace(
        with_multipliers(workload, seed),
        {(name, turn - 1): tokens for (name, turn), tokens in reusable.items() if turn},
        Workload(f"{AGENTS}-fill", (Session("fill", fill),)),
    )


def conversation(file: Path, requests: int, vocabulary: int, seed: int, alone: TtftModel) -> Trace:
    """Mooncake's conversations: an open loop by time stamps, scaled to a share of stock vLLM's compute capacity. Whole
    conversations are taken, so that the trace's reuse (31 %) is preserved."""
    scaling = Scaling(
        token_divisor=CONVERSATION_DIVISOR, context_tokens_max=CONTEXT_TOKENS_MAX, answer_tokens_max=ANSWER_TOKENS_MAX
    )
    kept = _whole_conversations(read_trace(file, scaling), requests)
    busy_s = sum(alone.ttft_s(0, session.turns[0].prompt_tokens) for session in kept)
    recorded_s = max(session.start_s for session in kept) - kept[0].start_s
    stretch = busy_s / CONVERSATION_UTILISATION / max(recorded_s, 1e-3)
    sessions = tuple(replace(session, start_s=(session.start_s - kept[0].start_s) * stretch) for session in kept)
    return _trace(Workload(CONVERSATION, sessions), vocabulary, seed)


def _whole_conversations(workload: Workload, requests: int) -> list[Session]:
    """Requests whose prompts have the same second segment (the first may be a system prompt), as long as they fit."""
    groups: dict[str, list[Session]] = {}
    for session in workload.sessions:
        prompt = session.turns[0].prompt
        groups.setdefault(prompt[min(1, len(prompt) - 1)].stream, []).append(session)
    kept: list[Session] = []
    for group in groups.values():
        if len(kept) + len(group) <= requests:
            kept += group
    return sorted(kept, key=lambda session: session.start_s)


def _trace(workload: Workload, vocabulary: int, seed: int) -> Trace:
    workload = with_multipliers(workload, seed)
    return Trace(workload, reusable_tokens(workload, vocabulary, REUSE_BLOCK_TOKENS))
