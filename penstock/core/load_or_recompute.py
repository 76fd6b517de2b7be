"""Load or recompute, per block: from the front a prefix is computed, from the back it is loaded, until they meet.

Useful only where the engine would wait for the load anyway: where computing a block is faster than waiting for it.
"""

from __future__ import annotations

from penstock.core.cost import ComputeCost


def recompute_tokens(
    hit_tokens: int,
    load_free_s: float,
    load_tokens_per_s: float,
    compute_free_s: float,
    compute: ComputeCost,
    block_tokens: int,
    context_tokens: int = 0,
) -> int:
    """How many tokens from the front to compute (whole blocks), so that computing them ends when the rest is loaded.

    `load_free_s` and `compute_free_s` are when the links and the engine get to this request, on one clock. Computing
    the front, after `context_tokens` that are there, is `compute.rebuild_s`; every block computed is one that the links
    need not carry. O(log blocks)."""
    if hit_tokens < block_tokens or load_tokens_per_s <= 0:
        return 0
    low, high = 0, hit_tokens // block_tokens
    while low < high:  # the most blocks whose computing ends no later than the load of the others
        middle = (low + high + 1) // 2
        tokens = middle * block_tokens
        load_end_s = load_free_s + (hit_tokens - tokens) / load_tokens_per_s
        if compute_free_s + compute.a + compute.rebuild_s(tokens, context_tokens) <= load_end_s:
            low = middle
        else:
            high = middle - 1
    return low * block_tokens


def recompute_whole(
    hit_tokens: int, load_free_s: float, load_tokens_per_s: float, compute_free_s: float, compute: ComputeCost
) -> int:
    """As `recompute_tokens`, for an engine that loads nothing behind what it computes: all of the hit where computing
    it ends before it would be loaded, else nothing."""
    if load_tokens_per_s <= 0:
        return 0
    load_end_s = load_free_s + hit_tokens / load_tokens_per_s
    return hit_tokens if compute_free_s + compute.a + compute.rebuild_s(hit_tokens, 0) < load_end_s else 0
