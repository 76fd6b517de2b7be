"""Load snapshot that an engine sends to the router (DualPath: seq_e, tok_e, read_q)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from penstock.core.engine.request import Request, State


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """`read_bytes` are still to be fetched over this engine's own storage NIC; `prefill_tokens` are neither in L1 nor
    among the hits. By decode engine: `remote_bytes` are still to be read through it, `handoff_blocks` wait to be sent
    to it or are on their way."""

    unfinished: int
    tokens: int
    prefill_tokens: int
    decoding: int
    read_bytes: int
    remote_bytes: Counter[str] = field(default_factory=Counter)
    handoff_blocks: Counter[str] = field(default_factory=Counter)


def engine_load(requests: Iterable[Request]) -> EngineLoad:
    """Of all requests that have not ended."""
    unfinished = tokens = prefill_tokens = decoding = read_bytes = 0
    remote_bytes: Counter[str] = Counter()
    handoff_blocks: Counter[str] = Counter()
    for request in requests:
        unfinished += 1
        tokens += len(request.tokens)
        if request.state is State.DECODE:
            decoding += 1
        elif request.state is not State.HANDOFF:
            coming = len(request.hits) * request.block_tokens
            prefill_tokens += max(0, request.target - max(request.position, coming))
        hand_off = request.spec.hand_off
        relayed = hand_off or request.spec.received
        remote = relayed.present_route[-1] if relayed is not None else None
        own_bytes = sum(size for route, size in request.loads.bytes_by_route.items() if route[-1] != remote)
        read_bytes += own_bytes
        if hand_off is not None:
            remote_bytes[hand_off.to] += sum(request.loads.bytes_by_route.values()) - own_bytes
            handoff_blocks[hand_off.to] += len(request.forwarding)
    return EngineLoad(unfinished, tokens, prefill_tokens, decoding, read_bytes, remote_bytes, handoff_blocks)
