"""Workloads: frozen sessions of turns, their tokens, and generators for the papers' tables. Deterministic by seed.

A session is a closed loop: each turn follows the previous answer after its `think_s`. An open loop is many sessions of
one turn. Tokens are described, not stored: a prompt is a list of segments of endless token streams, so that prompts
that share a stream share a prefix, on every machine and under every `PYTHONHASHSEED`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

RESERVED_TOKEN_IDS = 16  # the lowest ids, used for special tokens; never generated
SLO_MULTIPLIERS = (2.0, 4.0, 8.0)  # CALVO: the deadline is the interference-free TTFT times one of these
_STRATA = 256  # draws per value of a stratified sample


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `start .. start + length` of the endless stream named `stream`."""

    stream: str
    length: int
    start: int = 0


Prompt = tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """One request, sent `think_s` after the previous answer of its session (the first one after the session's start).

    `warm_tokens` leading tokens of the prompt are in the pool before the measurement begins; the deadline is
    `slo_multiplier` times the interference-free TTFT.
    """

    prompt: Prompt
    max_tokens: int
    think_s: float = 0.0
    slo_multiplier: float | None = None
    warm_tokens: int = 0

    @property
    def prompt_tokens(self) -> int:
        """Tokens of its prompt."""
        return sum(segment.length for segment in self.prompt)


@dataclass(frozen=True, slots=True)
class Session:
    """Consecutive turns, from `start_s` after the beginning of the replay."""

    name: str
    turns: tuple[Turn, ...]
    start_s: float = 0.0
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Workload:
    """Named sessions to replay."""

    name: str
    sessions: tuple[Session, ...]

    @property
    def requests(self) -> int:
        """Requests of all sessions."""
        return sum(len(session.turns) for session in self.sessions)

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of all requests."""
        return sum(turn.prompt_tokens for session in self.sessions for turn in session.turns)

    @property
    def context_tokens_max(self) -> int:
        """The longest prompt with its answer."""
        return max(turn.prompt_tokens + turn.max_tokens for session in self.sessions for turn in session.turns)


def stream_tokens(stream: str, start: int, length: int, vocabulary: int) -> list[int]:
    """Tokens of a stream, each in `RESERVED_TOKEN_IDS .. vocabulary`; SHAKE-128 of the stream's name."""
    if vocabulary <= RESERVED_TOKEN_IDS:
        raise ValueError(f"vocabulary is {vocabulary}; it must be above {RESERVED_TOKEN_IDS}")
    if length <= 0:
        return []
    raw = hashlib.shake_128(stream.encode()).digest(4 * (start + length))
    numbers = np.frombuffer(raw, dtype="<u4")[start:]
    ids: list[int] = (numbers % (vocabulary - RESERVED_TOKEN_IDS) + RESERVED_TOKEN_IDS).tolist()
    return ids


def prompt_tokens(prompt: Prompt, vocabulary: int) -> list[int]:
    """The token ids of a prompt for a model with `vocabulary` ids."""
    tokens: list[int] = []
    for segment in prompt:
        tokens += stream_tokens(segment.stream, segment.start, segment.length, vocabulary)
    return tokens


def _generator(*parts: object) -> np.random.Generator:
    """A random generator seeded with its purpose."""
    digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def stratified_gamma(rng: np.random.Generator, mean: float, shape: float, count: int) -> np.ndarray:
    """`count` gamma values in random order, one from each of `count` equally likely strata, so that the mean and the
    mean reciprocal are accurate for small counts too; then scaled to exactly `mean`."""
    draws = np.sort(rng.gamma(shape, mean / shape, size=count * _STRATA))
    values = draws[_STRATA // 2 :: _STRATA]
    values = values * (mean / float(values.mean()))
    shuffled: np.ndarray = rng.permutation(values)
    return shuffled


def poisson_starts_s(rng: np.random.Generator, rate_per_s: float, count: int) -> list[float]:
    """Arrival times of a Poisson process; all zero for an infinite rate (everything at once)."""
    if not rate_per_s > 0:
        raise ValueError(f"rate_per_s is {rate_per_s}; it must be above 0")
    return [float(t) for t in np.cumsum(rng.exponential(1.0 / rate_per_s, size=count))]


@dataclass(frozen=True, slots=True)
class CalvoDataset:
    """One row of CALVO's table of datasets (PAPERS.md section 1)."""

    requests: int
    context_tokens_mean: int
    query_tokens_mean: int


CALVO_DATASETS = {
    "loogle": CalvoDataset(120, 28_100, 28),
    "icl": CalvoDataset(120, 28_300, 61),
    "code": CalvoDataset(100, 38_300, 209),
}


def calvo(
    dataset: str,
    rate_per_s: float,
    seed: int,
    *,
    requests: int | None = None,
    context_spread: float = 0.3,
    query_spread: float = 0.3,
    hit_ratios: Sequence[float] = (1.0,),
    context_tokens_multiple: int = 64,
    max_tokens: int = 1,
) -> Workload:
    """CALVO's load: Poisson arrivals of single requests, each a long context that the pool holds and a short query.

    The paper prints means only: lengths are gamma-distributed around them with `*_spread` as standard deviation over
    mean (our choice), contexts rounded to `context_tokens_multiple`. `warm_tokens` is the context times a ratio drawn
    from `hit_ratios` (the paper's second experiment: 0.25, 0.5, 0.75, 1.0).
    """
    if dataset not in CALVO_DATASETS:
        raise ValueError(f"dataset is {dataset!r}; allowed are {', '.join(CALVO_DATASETS)}")
    row = CALVO_DATASETS[dataset]
    count = row.requests if requests is None else requests
    rng = _generator("calvo", dataset, seed)
    contexts = stratified_gamma(rng, row.context_tokens_mean, context_spread**-2, count)
    queries = stratified_gamma(rng, row.query_tokens_mean, query_spread**-2, count)
    multipliers = rng.choice(SLO_MULTIPLIERS, size=count)
    ratios = rng.choice(np.asarray(hit_ratios, dtype=float), size=count)
    starts_s = poisson_starts_s(_generator("calvo arrivals", dataset, seed), rate_per_s, count)
    sessions = []
    for i in range(count):
        unit = context_tokens_multiple
        context = max(unit, round(float(contexts[i]) / unit) * unit)
        query = max(1, round(float(queries[i])))
        warm = round(context * float(ratios[i]) / unit) * unit
        name = f"{dataset}-{seed}-{i}"
        prompt = (Segment(f"context/{name}", context), Segment(f"query/{name}", query))
        turn = Turn(prompt, max_tokens, slo_multiplier=float(multipliers[i]), warm_tokens=warm)
        sessions.append(Session(name, (turn,), start_s=starts_s[i]))
    return Workload(f"calvo-{dataset}", tuple(sessions))


@dataclass(frozen=True, slots=True)
class AgentTable:
    """One row of DualPath's table of agent trajectories (PAPERS.md section 3): means per trajectory."""

    length_tokens_max: int
    turns: int
    append_tokens: int
    generated_tokens: int
    total_tokens: int
    context_tokens: int


AGENT_TABLES = {
    "32K": AgentTable(32_768, 60, 608, 148, 28_639, 17_183),
    "48K": AgentTable(49_152, 106, 474, 172, 42_607, 25_120),
    "64K": AgentTable(65_536, 157, 429, 176, 55_958, 32_721),
}


def _trajectory_turns(rng: np.random.Generator, table: AgentTable, sessions: int) -> np.ndarray:
    """The number of turns of each trajectory.

    Mean tokens per turn (append + generated) times mean turns is far above the mean total: trajectories with many turns
    append less. If the total is independent of the turns, E[1 / turns] = (append + generated) / total, which for a
    gamma distribution determines the shape.
    """
    reciprocal = (table.append_tokens + table.generated_tokens) / table.total_tokens
    shape = 1.0 / (1.0 - 1.0 / (table.turns * reciprocal))
    counts: np.ndarray = np.maximum(2, np.rint(stratified_gamma(rng, table.turns, shape, sessions))).astype(int)
    return counts


def _split(rng: np.random.Generator, total: int, parts: int) -> list[int]:
    """`parts` positive numbers with exponential spread that add up to `total` (at least `parts`)."""
    weights = rng.exponential(1.0, size=parts)
    edges = np.rint(np.cumsum(weights) / weights.sum() * max(0, total - parts)).astype(int)
    return [int(n) + 1 for n in np.diff(edges, prepend=0)]


@dataclass(frozen=True, slots=True)
class AgentLengths:
    """One trajectory as token counts, turn by turn."""

    appends: list[int]
    answers: list[int]
    start_s: float


def agent_lengths(
    length: str,
    sessions: int,
    seed: int,
    *,
    rate_per_s: float = float("inf"),
    token_divisor: int = 1,
    turns_divisor: int = 1,
    first_tokens_min: int = 1,
) -> list[AgentLengths]:
    """The token counts of `agent_trajectories` without their prompts, for large simulations."""
    if length not in AGENT_TABLES:
        raise ValueError(f"length is {length!r}; allowed are {', '.join(AGENT_TABLES)}")
    table = AGENT_TABLES[length]
    rng = _generator("agents", length, seed)
    starts_s = poisson_starts_s(rng, rate_per_s, sessions) if np.isfinite(rate_per_s) else [0.0] * sessions
    turns = _trajectory_turns(rng, table, sessions)
    spread = 1.0 - table.total_tokens / table.length_tokens_max
    fractions = 1.0 - stratified_gamma(rng, spread, 4.0, sessions).clip(max=0.6)
    first_share = max(0.0, 2.0 * table.context_tokens / table.total_tokens - 1.0)
    generated_share = table.generated_tokens / (table.append_tokens + table.generated_tokens)
    made = []
    for i in range(sessions):
        count = max(2, round(int(turns[i]) / turns_divisor))
        total = table.length_tokens_max * float(fractions[i]) / token_divisor
        first = max(1, first_tokens_min, round(total * first_share))
        generated = max(count, round(total * generated_share / turns_divisor))
        appended = max(count - 1, round(total * (1.0 - first_share) / turns_divisor) - generated)
        appends = [first, *_split(rng, appended, count - 1)]
        answers = _split(rng, generated, count)
        made.append(AgentLengths(appends, answers, starts_s[i]))
    return made


def agent_trajectories(
    length: str,
    sessions: int,
    seed: int,
    *,
    rate_per_s: float = float("inf"),
    token_divisor: int = 1,
    turns_divisor: int = 1,
    turns_max: int | None = None,
    shared_prefix_tokens: int = 0,
    think_s: float = 0.0,
    answer_tokens_max: int | None = None,
) -> Workload:
    """DualPath's agents: multi-turn trajectories whose prompt is the whole context so far plus an append.

    Turns, append, generated and total tokens have the table's means; the first append holds the share of the total
    that makes the mean context right. `token_divisor` scales all lengths, `turns_divisor` the turns and (to keep what
    a turn appends) the total. All sessions begin with the same `shared_prefix_tokens` (part of the first append).
    `answer_tokens_max` cuts what is asked for, not the recorded answers in later prompts.
    """
    made = []
    lengths = agent_lengths(
        length, sessions, seed, rate_per_s=rate_per_s, token_divisor=token_divisor, turns_divisor=turns_divisor,
        first_tokens_min=shared_prefix_tokens,
    )  # fmt: skip
    for i, agent in enumerate(lengths):
        name = f"agent-{length}-{seed}-{i}"
        made.append(_trajectory(name, agent.appends, agent.answers, shared_prefix_tokens, agent.start_s, think_s))
    if turns_max is not None:
        made = [replace(s, turns=s.turns[:turns_max]) for s in made]
    if answer_tokens_max is not None:
        made = [_shorter_answers(session, answer_tokens_max) for session in made]
    return Workload(f"agents-{length}", tuple(made))


def _shorter_answers(session: Session, tokens_max: int) -> Session:
    return replace(session, turns=tuple(replace(t, max_tokens=min(t.max_tokens, tokens_max)) for t in session.turns))


def _trajectory(
    name: str, appends: list[int], answers: list[int], shared_prefix_tokens: int, start_s: float, think_s: float
) -> Session:
    """Turns of one agent; an answer in the context is the recorded one, from a separate stream."""
    prompt: list[Segment] = []
    if shared_prefix_tokens:
        prompt.append(Segment("shared-system-prompt", shared_prefix_tokens))
    turns = []
    for i, (append, answer) in enumerate(zip(appends, answers, strict=True)):
        rest = append - shared_prefix_tokens if i == 0 else append
        if rest > 0:
            prompt.append(Segment(f"append/{name}/{i}", rest))
        turns.append(Turn(tuple(prompt), answer, think_s=0.0 if i == 0 else think_s))
        prompt.append(Segment(f"answer/{name}/{i}", answer))
    return Session(name, tuple(turns), start_s=start_s)
