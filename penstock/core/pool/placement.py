"""Which node of a large pool a run of blocks goes to: slots of a map that everybody computes from the same nodes.

SLOT-1   Statement: The map follows from names and weights of the nodes alone, whatever their order, so all who know the
         same nodes compute the same map, and its version says whether they do.
SLOT-2   Statement: A node has its share of the slots by weight, to within two.
SLOT-3   Statement: A node that is added, removed or weighted anew moves few slots beside its own (measured: with one of
         64 nodes removed 2.6 % of the slots, where 1.6 % were its own).
Verification: tests/core/pool/test_placement.py.

Source: Maglev (Eisenbud et al., NSDI 2016, section 3.4), with turns by weight. Weighted rendezvous moves nothing beside
a node's own slots, but over 256 nodes the largest share of 16,384 slots is then a third more than the mean.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from penstock.core.keys import BlockKey

STRIPED_NODES_MAX = 16  # up to so many, every block is striped over all of them, and all are asked for it
SLOTS = 16_384
SLOT_NODES_MAX = SLOTS // 4  # with more, shares are too coarse
_SLOT_BITS = SLOTS - 1


def slot_of(key: BlockKey) -> int:
    """The slot of the run that begins with this block."""
    return int.from_bytes(key[:4], "little") & _SLOT_BITS


def agreed_weight(bytes_per_s: float) -> float:
    """A node's weight from what it says of its members, rounded to powers of the square root of two, so that a start
    at which they measure a little differently moves nothing."""
    return 2.0 ** (round(2 * math.log2(bytes_per_s)) / 2) if bytes_per_s > 0 else 0.0


@dataclass(slots=True)
class _Turns:
    """What a node asks for next: slots from `at` on, each `step` further, in turns by `weight`."""

    at: int
    step: int
    weight: float
    taken: int = 0


class SlotMap:
    """Slots of nodes, each a number of the caller's; immutable."""

    def __init__(self, nodes: Sequence[tuple[int, str, float]]) -> None:
        """(number, name, weight) of each node; those without weight get no slot. Raises ValueError for a name that
        comes twice, too many nodes, or none with a weight above 0."""
        weighted = [(number, name, weight) for number, name, weight in nodes if weight > 0]
        names = {name for _, name, _ in weighted}
        if len(names) < len(weighted) or not 0 < len(weighted) <= SLOT_NODES_MAX:
            raise ValueError(
                f"{len(weighted)} nodes with a weight, {len(names)} names; allowed: 1 to {SLOT_NODES_MAX} that differ"
            )
        said = "\n".join(f"{name} {weight!r}" for name, weight in sorted((name, w) for _, name, w in weighted))
        self.version = hashlib.blake2b(said.encode(), digest_size=8).hexdigest()
        self.nodes = len(weighted)
        total = sum(weight for _, _, weight in weighted)
        self._shares = {number: weight / total for number, _, weight in weighted}
        self._owners = _filled(weighted)

    def share(self, number: int) -> float:
        """A node's share of the slots; 0 for one without."""
        return self._shares.get(number, 0.0)

    def owner(self, slot: int) -> int:
        """The number of the node that has a slot."""
        return self._owners[slot]

    def order(self, slot: int) -> Iterator[int]:
        """All nodes: the owner, then those that stand in for it, as everybody computes them."""
        seen: set[int] = set()
        for at in range(slot, slot + SLOTS):
            number = self._owners[at & _SLOT_BITS]
            if number not in seen:
                seen.add(number)
                yield number
                if len(seen) == self.nodes:
                    return


def copy_node(key: BlockKey, nodes: Sequence[tuple[int, str, float]]) -> int | None:
    """Of these nodes (number, name, weight), that which a copy of a block of a striped pool goes to, as everybody
    computes it: weighted rendezvous, so that the copies of one node's blocks spread over all others. None without a
    node of weight above 0."""

    def score(name: str, weight: float) -> float:
        digest = hashlib.blake2b(key + name.encode(), digest_size=8).digest()
        return -weight / math.log((int.from_bytes(digest, "little") + 0.5) / 2.0**64)

    return max((node for node in nodes if node[2] > 0), key=lambda one: score(*one[1:]), default=(None,))[0]


def _filled(nodes: Sequence[tuple[int, str, float]]) -> list[int]:
    """The owner of each slot: nodes take turns by weight, each takes the next free one in an order of its own."""
    turns: dict[int, _Turns] = {}
    queue: list[tuple[float, bytes, int]] = []
    for number, name, weight in nodes:
        digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
        first, step = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
        turns[number] = _Turns(first & _SLOT_BITS, step & _SLOT_BITS | 1, weight)  # an odd step reaches every slot
        queue.append((0.5 / weight, digest, number))
    heapq.heapify(queue)
    owners = [-1] * SLOTS
    for _ in range(SLOTS):
        _, digest, number = queue[0]
        turn = turns[number]
        while owners[turn.at] >= 0:
            turn.at = turn.at + turn.step & _SLOT_BITS
        owners[turn.at] = number
        turn.taken += 1
        heapq.heapreplace(queue, ((turn.taken + 0.5) / turn.weight, digest, number))
    return owners
