"""The intra-engine compute quota: which chunks go into a prefill engine's next batch (DualPath).

First in, first out, packed by predicted attention time up to a quota, so that data-parallel ranks that meet in every
layer spend about the same time on attention; the request that overflows is cut by binary search (chunked prefill).
The baseline packs by tokens.

Beyond the paper: ranks in step take `level_s` of their ready work instead of a fixed quota. With few requests per rank
a fixed quota limits none of them, and the step takes as long as the rank with the most work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from penstock.core.config import ConfigError, check_range

ROUNDING = 1e-9  # sums of the same numbers in another order differ by less


@dataclass(frozen=True, slots=True)
class AttentionCost:
    """Seconds of attention of q query tokens after c context tokens: `per_query_s.q + per_pair_s.q.(c + q/2)`."""

    per_query_s: float
    per_pair_s: float

    def seconds(self, query_tokens: int, context_tokens: float) -> float:
        """Predicted seconds of attention for one chunk."""
        return query_tokens * (self.per_query_s + self.per_pair_s * (context_tokens + 0.5 * query_tokens))

    def tokens_within(self, query_tokens: int, context_tokens: float, left_s: float) -> int:
        """The most of `query_tokens` whose attention takes at most `left_s`: binary search."""
        low, high = 0, query_tokens
        while low < high:
            middle = (low + high + 1) // 2
            if self.seconds(middle, context_tokens) <= left_s:
                low = middle
            else:
                high = middle - 1
        return low


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

    def ready_s(self, waiting: Iterable[tuple[int, float]]) -> float:
        """Attention time of what waits, up to `attention_s_max`."""
        per_query, per_pair = self.attention.per_query_s, self.attention.per_pair_s
        total_s = 0.0
        for query, context in waiting:
            total_s += query * (per_query + per_pair * (context + 0.5 * query))
            if total_s >= self.attention_s_max:
                return self.attention_s_max
        return total_s

    def pack(
        self, waiting: Iterable[tuple[int, float]], attention_s_max: float | None = None
    ) -> tuple[list[int], float]:
        """Query tokens to take of each waiting request in turn, `(query_tokens, context_tokens)` first in, first out;
        and their attention time. At least one token is taken where anything waits. A list shorter than what waits
        ends at the request that no longer fits. A lower `attention_s_max` may be given for this batch."""
        taken: list[int] = []
        per_query, per_pair = self.attention.per_query_s, self.attention.per_pair_s
        left_s = self.attention_s_max if attention_s_max is None else min(attention_s_max, self.attention_s_max)
        left_tokens = self.tokens_max
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
            cut = left_tokens
            if by_attention:
                cut = self.attention.tokens_within(min(query, left_tokens), context, left_s)
            if not cut and not taken:
                cut = 1
            if cut:
                taken.append(cut)
                spent_s += self.attention.seconds(cut, context)
            break
        return taken, spent_s


def level_s(ready_s: Sequence[float], overhead_s: float) -> float:
    """The quota at which ranks that meet get most done per second of a step, of those at which a rank is through.

    `ready_s` is what each rank with work has ready. With quota x a step takes `overhead_s + x` and does the sum of
    `min(ready, x)`; what is over stays for the next step. 0 where nothing is ready. O(n log n)."""
    best_rate, best_s = -1.0, 0.0
    through_s, left = 0.0, len(ready_s)  # of the ranks with less, and how many have no less
    for quota_s in sorted(ready_s):
        rate = (through_s + quota_s * left) / (overhead_s + quota_s) if quota_s > 0 else 0.0
        if rate > best_rate:
            best_rate, best_s = rate, quota_s
        through_s += quota_s
        left -= 1
    return best_s * (1 + ROUNDING)
