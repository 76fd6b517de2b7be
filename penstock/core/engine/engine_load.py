"""Load snapshot that an engine sends to the router (DualPath: seq_e, tok_e, read_q)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from penstock.core.engine.request import Request, State


@dataclass(frozen=True, slots=True)
class Standing:
    """`read_bytes` are still to be fetched over this engine's own storage NIC; `prefill_tokens` are neither in L1 nor
    among the hits. By decode engine: `far_bytes` are still to be read through it, `handing_blocks` wait to be handed
    over to it or are on their way."""

    unfinished: int
    tokens: int
    prefill_tokens: int
    decoding: int
    read_bytes: int
    far_bytes: Counter[str] = field(default_factory=Counter)
    handing_blocks: Counter[str] = field(default_factory=Counter)


def standing(requests: Iterable[Request]) -> Standing:
    """Of all requests that have not ended."""
    unfinished = tokens = prefill_tokens = decoding = read_bytes = 0
    far_bytes: Counter[str] = Counter()
    handing_blocks: Counter[str] = Counter()
    for request in requests:
        unfinished += 1
        tokens += len(request.tokens)
        if request.state is State.DECODE:
            decoding += 1
        elif request.state is not State.HANDING:
            coming = len(request.hits) * request.block_tokens
            prefill_tokens += max(0, request.target - max(request.position, coming))
        hand_off = request.spec.hand_off
        far = hand_off.present_route[-1] if hand_off is not None else None
        own_bytes = sum(size for route, size in request.bytes_by_route.items() if route[-1] != far)
        read_bytes += own_bytes
        if hand_off is not None:
            far_bytes[hand_off.to] += sum(request.bytes_by_route.values()) - own_bytes
            handing_blocks[hand_off.to] += len(request.forwarding)
    return Standing(unfinished, tokens, prefill_tokens, decoding, read_bytes, far_bytes, handing_blocks)
