"""Which side reads a request's blocks, and what that puts on every link (DualPath, sections on data paths and sides).

A *prefill read* brings the hit blocks over the storage NIC of the prefill engine's node, a *decode read* over that of
the decode engine's node and then, layer by layer, over the compute network; a *split read* does both at once, each side
a part of the blocks. Beyond the paper: split reads, and sides compared by seconds instead of tokens.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

from penstock.core.operations import Route

ReadSide = Literal["prefill", "decode", "split", "none"]
ReadPolicy = Literal["prefill", "alternate", "shorter", "split", "none"]
READ_POLICIES: tuple[str, ...] = get_args(ReadPolicy)


class Leg(NamedTuple):
    """One step of a request's KV: the links it crosses, how many tokens of KV, in full blocks or by layer."""

    name: str
    route: Route
    tokens: int
    by_layer: bool


class LinkTokens(NamedTuple):
    """Tokens of KV that one request puts on each link (storage NICs; compute NICs of its two engines, by direction).

    "All GPU traffic, local copies included, goes through the paired CNIC": a local copy counts in both directions.
    """

    prefill_storage: int
    decode_storage: int
    prefill_in: int
    prefill_out: int
    decode_in: int
    decode_out: int


def link_tokens(hit_tokens: int, miss_tokens: int, decode_tokens: int) -> LinkTokens:
    """What a request puts on its links when the decode side reads `decode_tokens` of its `hit_tokens`."""
    prefill_tokens = hit_tokens - decode_tokens
    prompt_tokens = hit_tokens + miss_tokens
    return LinkTokens(
        prefill_storage=prefill_tokens,
        decode_storage=decode_tokens,
        prefill_in=hit_tokens,
        prefill_out=2 * prefill_tokens + miss_tokens,
        decode_in=prefill_tokens + miss_tokens + prompt_tokens,
        decode_out=decode_tokens + prompt_tokens,
    )


def legs(
    hit_tokens: int, miss_tokens: int, decode_tokens: int, *, prefill_node: str, prefill_engine: str, decode_node: str,
    decode_engine: str,
) -> list[Leg]:  # fmt: skip
    """The way of a request's KV, in order: storage to the buffers, buffers to the prefill engine, hand-off, copy up."""
    prefill_nic, decode_nic = f"cnic@{prefill_engine}", f"cnic@{decode_engine}"
    own = hit_tokens - decode_tokens
    found = [
        Leg("prefill read", (f"snic@{prefill_node}",), own, False),
        Leg("decode read", (f"snic@{decode_node}",), decode_tokens, False),
        Leg("local load", (prefill_nic,), own, True),
        Leg("relay", (decode_nic, prefill_nic), decode_tokens, True),
        Leg("hand-off", (prefill_nic, decode_nic), own + miss_tokens, True),
        Leg("copy up", (decode_nic,), hit_tokens + miss_tokens, True),
    ]
    return [leg for leg in found if leg.tokens]


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
