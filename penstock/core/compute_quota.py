"""The intra-engine compute quota: which chunks go into a prefill engine's next batch (DualPath).

First in, first out, packed by predicted attention time up to a quota, so that data-parallel ranks that meet in every
layer spend about the same time on attention; the request that overflows is cut by binary search (chunked prefill).
The baseline packs by tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from penstock.core.config import ConfigError, check_range


@dataclass(frozen=True, slots=True)
class AttentionCost:
    """Seconds of attention of q query tokens after c context tokens: `per_query_s.q + per_pair_s.q.(c + q/2)`."""

    per_query_s: float
    per_pair_s: float

    def seconds(self, query_tokens: int, context_tokens: float) -> float:
        return query_tokens * (self.per_query_s + self.per_pair_s * (context_tokens + 0.5 * query_tokens))


@dataclass(frozen=True, slots=True)
class ComputeQuota:
    """Limits of one batch; `by` "attention" is DualPath's, "tokens" the usual bound of engines without it."""

    attention: AttentionCost
    by: str = "attention"
    attention_s_max: float = 0.3
    tokens_max: int = 16_384
    requests_max: int = 256

    def __post_init__(self) -> None:
        if self.by not in ("attention", "tokens"):
            raise ConfigError(f"by is {self.by!r}; allowed: attention, tokens")
        check_range("attention_s_max", self.attention_s_max, 1e-6, 1e6)
        check_range("tokens_max", self.tokens_max, 1, 1e9)
        check_range("requests_max", self.requests_max, 1, 1e6)

    def pack(self, waiting: Iterable[tuple[int, float]]) -> tuple[list[int], float]:
        """Query tokens to take of each waiting request in turn, `(query_tokens, context_tokens)` first in, first out;
        and their attention time. At least one token is taken where anything waits. A list shorter than what waits
        ends at the request that no longer fits."""
        taken: list[int] = []
        per_query, per_pair = self.attention.per_query_s, self.attention.per_pair_s
        left_s, left_tokens = self.attention_s_max, self.tokens_max
        by_attention = self.by == "attention"
        spent_s = 0.0
        for query, context in waiting:
            if len(taken) >= self.requests_max or left_tokens <= 0:
                break
            need_s = query * (per_query + per_pair * (context + 0.5 * query))
            if query <= left_tokens and (need_s <= left_s or not by_attention):
                taken.append(query)
                spent_s += need_s
                left_s -= need_s
                left_tokens -= query
                continue
            cut = self.cut(min(query, left_tokens), context, left_s) if by_attention else left_tokens
            if not cut and not taken:
                cut = 1
            if cut:
                taken.append(cut)
                spent_s += self.attention.seconds(cut, context)
            break
        return taken, spent_s

    def cut(self, query_tokens: int, context_tokens: float, left_s: float) -> int:
        """The most of `query_tokens` whose attention takes at most `left_s`: binary search."""
        low, high = 0, query_tokens
        while low < high:
            middle = (low + high + 1) // 2
            if self.attention.seconds(middle, context_tokens) <= left_s:
                low = middle
            else:
                high = middle - 1
        return low
