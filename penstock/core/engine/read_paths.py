"""Which side reads each hit block of a request with a hand-off: over its own storage NIC, or through that of the decode
engine (DualPath, section on data paths; a split read uses both at once)."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.core.operations import BlockHit, HandOff, Route

Hits = dict[int, BlockHit]


def assign_read_paths(
    hits: Sequence[BlockHit | None], hand_off: HandOff, block_bytes: int, blocks: int
) -> tuple[Hits, Hits]:
    """The hits of a prompt's first `blocks` blocks with their routes, and with the routes of the other side where both
    can read them: `hits` are what this side's lookup found (all None when it failed). A block in the decode engine's
    buffer is taken from there; one that only one side can read is read there."""
    routed: Hits = {}
    other: Hits = {}
    share, due = _decode_share(hand_off), 0.0
    for index in range(blocks):
        own = hits[index] if index < len(hits) else None
        if index in hand_off.present:
            routed[index] = BlockHit(block_bytes, hand_off.present_route)
            if own is not None:
                other[index] = own
            continue
        remote = BlockHit(block_bytes, hand_off.read_route) if index in hand_off.readable else None
        if own is not None and remote is not None:
            due += share  # spread evenly, so that both sides serve the prefix from its front
            if due >= 1.0 - 1e-9:
                due -= 1.0
                other[index], own = own, None
            else:
                other[index] = remote
        found = own or remote
        if found is not None:
            routed[index] = found
    return routed, other


def is_remote(route: Route, hand_off: HandOff) -> bool:
    """Whether the route crosses the decode engine's storage NIC."""
    return route == hand_off.read_route


def _decode_share(hand_off: HandOff) -> float:
    if hand_off.read == "split":
        return hand_off.decode_share
    return 1.0 if hand_off.read == "decode" else 0.0
