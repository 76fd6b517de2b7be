"""Which member of the pool a block goes to: shares by bandwidth, spread in prefix order.

Source: Unified KV Pooling (organizer: floor plus remainder; each range of a prefix on all members at once).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction

CYCLE_BLOCKS = 840  # length of the repeated pattern: divisible by 1..8, so that equal members share it exactly


def shares(weights: Sequence[float], blocks: int) -> list[int]:
    """Split `blocks` by weight: floors first, the rest to the largest remainders (the first member wins a tie).

    The result adds up to `blocks`. Raises ValueError when a weight is negative or none is positive.
    """
    if not weights or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(f"weights are {list(weights)}; they must be at least 0, with one above 0")
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact)
    quotas = [weight * blocks / total for weight in exact]
    result = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: (result[i] - quotas[i], i))
    for i in by_remainder[: blocks - sum(result)]:
        result[i] += 1
    return result


def spread(counts: Sequence[int]) -> list[int]:
    """An order of `sum(counts)` blocks in which member i has less than 1 block more or less than its share of every
    beginning (so less than 2 of every range). Tijdeman's rule for the chairman assignment problem, in integers."""
    total = sum(counts)
    members = [i for i, count in enumerate(counts) if count]
    if len(members) == 1:
        return [members[0]] * total
    given = [0] * len(counts)
    order = []
    scale = 2 * len(members) - 2
    for step in range(1, total + 1):
        # Member i may take this step when its due, counts[i] * step / total - given[i], is at least 1 / scale.
        due = {i: (counts[i] * step - given[i] * total) * scale for i in members}
        allowed = [i for i in members if due[i] >= total]
        # Of these the one whose next block would be late first takes it.
        chosen = min(allowed, key=lambda i: (Fraction((scale - 1) * total - due[i], counts[i]), i))
        given[chosen] += 1
        order.append(chosen)
    return order


class Placement:
    """Maps positions in a prefix to members. Positions are any integers; consecutive blocks have consecutive ones.

    A member without health or weight gets nothing. Capacity is the caller's: it takes the first member of
    `order(position)` that has room.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        shares(weights, 1)  # refuses weights that are never usable
        self._weights = [float(weight) for weight in weights]
        self._healthy = [True] * len(self._weights)
        self._cycle: list[int] = []
        self._members: list[int] = []  # with health and weight
        self._owned: list[list[int]] = []  # positions in the cycle of each member
        self._stale = True  # the three above are of other weights; a plan of hundreds of members takes long

    @property
    def weights(self) -> tuple[float, ...]:
        """Share of each member, adding up to 1; a fenced member has a number too. All 0 when no weight is above 0."""
        total = sum(self._weights)
        return tuple(weight / total if total else 0.0 for weight in self._weights)

    @property
    def total_weight(self) -> float:
        """All weights added up, on the scale that they were given."""
        return sum(self._weights)

    def set_health(self, member: int, healthy: bool) -> None:
        """Fence a member or take it back; the other members share its blocks by their weights."""
        if self._healthy[member] != healthy:
            self._healthy[member] = healthy
            self._stale = True

    def set_weight(self, member: int, weight: float) -> None:
        """Give a member another share from now on; blocks that lie somewhere stay. Raises ValueError below 0."""
        if weight < 0:
            raise ValueError(f"the weight of member {member} is {weight}; it must be at least 0")
        if self._weights[member] != weight:
            self._weights[member] = float(weight)
            self._stale = True

    def add(self, weight: float) -> int:
        """A further member; returns its number. Raises ValueError below 0."""
        if weight < 0:
            raise ValueError(f"the weight of a new member is {weight}; it must be at least 0")
        self._weights.append(float(weight))
        self._healthy.append(True)
        self._stale = True
        return len(self._weights) - 1

    def order(self, position: int) -> list[int]:
        """Healthy members, best first: the owner of this position, then the others as their positions follow.
        Empty when no member is healthy."""
        if self._stale:
            self._plan()
        if not self._cycle:
            return []
        owner = self._cycle[position % len(self._cycle)]
        others = [i for i in self._members if i != owner]
        # The order of the rest turns from one position of the owner to its next, so that what overflows spreads.
        turn = self.rank(position, owner) % max(1, len(others))
        return [owner, *others[turn:], *others[:turn]]

    @property
    def taking(self) -> list[int]:
        """The members that blocks are placed on."""
        if self._stale:
            self._plan()
        return self._members

    def owner(self, position: int) -> int | None:
        """The member that `position` belongs to; None when no member is healthy."""
        if self._stale:
            self._plan()
        return self._cycle[position % len(self._cycle)] if self._cycle else None

    def rank(self, position: int, member: int) -> int:
        """How many of the positions from 0 up to `position` belong to `member`. The ranks of one member have no gaps,
        so it can spread its blocks further as evenly."""
        if self._stale:
            self._plan()
        turns, at = divmod(position, CYCLE_BLOCKS)
        owned = self._owned[member]
        return turns * len(owned) + bisect_left(owned, at)

    def _plan(self) -> None:
        self._stale = False
        usable = [weight if healthy else 0.0 for weight, healthy in zip(self._weights, self._healthy, strict=True)]
        if sum(usable) <= 0:
            self._cycle, self._members = [], []
            self._owned = [[] for _ in usable]
            return
        self._cycle = spread(shares(usable, CYCLE_BLOCKS))
        self._owned = [[at for at, owner in enumerate(self._cycle) if owner == i] for i in range(len(usable))]
        self._members = [i for i, weight in enumerate(usable) if weight > 0]
