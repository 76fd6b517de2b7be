"""Which side reads a request's blocks (DualPath, sections on data paths and sides).

A *prefill read* brings the hit blocks over the storage NIC of the prefill engine's node, a *decode read* over that of
the decode engine's node and then, layer by layer, over the compute network; a *split read* does both at once, each side
a part of the blocks. Beyond the paper: split reads, and sides compared by seconds instead of tokens.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

ReadSide = Literal["prefill", "decode", "split", "none"]
ReadPolicy = Literal["prefill", "alternate", "shorter", "split", "none"]
READ_POLICIES: tuple[str, ...] = get_args(ReadPolicy)


def shorter_side(prefill_wait_s: float, decode_wait_s: float) -> ReadSide:
    """The side with the shorter read queue; the prefill side where they are equal (it relays nothing)."""
    return "decode" if decode_wait_s < prefill_wait_s else "prefill"


def split_tokens(
    hit_tokens: int,
    prefill_wait_s: float,
    decode_wait_s: float,
    prefill_tokens_per_s: float,
    decode_tokens_per_s: float,
    block_tokens: int,
    part_tokens_min: int,
) -> int:
    """How many of `hit_tokens` the decode side reads, so that both sides end at the same time: whole blocks.

    `*_wait_s` are the read queues ahead. A part below `part_tokens_min` is not worth its own read and goes to the other
    side. A side with a rate of 0 reads nothing."""
    if decode_tokens_per_s <= 0:
        return 0
    if prefill_tokens_per_s <= 0:
        return hit_tokens
    lead_s = prefill_wait_s - decode_wait_s
    rates = prefill_tokens_per_s + decode_tokens_per_s
    share = (hit_tokens + lead_s * prefill_tokens_per_s) * decode_tokens_per_s / rates
    if not math.isfinite(share):
        share = hit_tokens if lead_s > 0 else 0.0
    tokens = round(share / block_tokens) * block_tokens
    if tokens < part_tokens_min:
        return 0
    if tokens > hit_tokens - part_tokens_min:
        return hit_tokens
    return tokens
