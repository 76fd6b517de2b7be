"""Amounts of members that have a rank, and their sums over all members up to a rank."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

from penstock.core.ordering import Rank

Name = TypeVar("Name", bound=Hashable)


class _Node(Generic[Name]):
    """One member. `sums` are the amounts of its whole subtree."""

    __slots__ = ("amounts", "left", "priority", "rank", "right", "sums")

    def __init__(self, rank: Rank, priority: int, amounts: dict[Name, int]) -> None:
        self.rank = rank
        self.priority = priority
        self.amounts = amounts
        self.sums = dict(amounts)
        self.left: _Node[Name] | None = None
        self.right: _Node[Name] | None = None

    def add_up(self) -> None:
        """Set `sums` from the members below."""
        self.sums = dict(self.amounts)
        for child in (self.left, self.right):
            if child is not None:
                _add(self.sums, child.sums)


class RankedSums(Generic[Name]):
    """A treap (Seidel, Aragon 1996): each call is O(log n) expected, for each name. Amounts are whole numbers, so that
    a sum does not depend on what was added in which order."""

    def __init__(self) -> None:
        self._root: _Node[Name] | None = None
        self._amounts: dict[Rank, dict[Name, int]] = {}
        self._priority = 0  # pseudo-random

    def __len__(self) -> int:
        return len(self._amounts)

    def add(self, rank: Rank, amounts: Mapping[Name, int]) -> None:
        """A member comes, of a rank that no other one has."""
        assert rank not in self._amounts
        self._priority = (self._priority * 6364136223846793005 + 1442695040888963407) % 2**64  # Knuth's MMIX
        node = _Node(rank, self._priority, {name: amount for name, amount in amounts.items() if amount})
        self._amounts[rank] = node.amounts
        before, after = _split(self._root, rank)
        self._root = _join(_join(before, node), after)

    def remove(self, rank: Rank) -> None:
        """The member of this rank goes."""
        del self._amounts[rank]
        self._root = _without(self._root, rank)

    def change(self, rank: Rank, amounts: Mapping[Name, int]) -> None:
        """The member of this rank has other amounts."""
        own = self._amounts[rank]
        change = {name: amounts.get(name, 0) - own.get(name, 0) for name in own.keys() | amounts.keys()}
        node = self._root
        while node is not None:
            _add(node.sums, change)
            if node.rank == rank:
                _add(node.amounts, change)
                return
            node = node.left if rank < node.rank else node.right

    def up_to(self, rank: Rank) -> dict[Name, int]:
        """Sums over the members of this rank and of less; names without any are left out."""
        total: dict[Name, int] = {}
        node = self._root
        while node is not None:
            if rank < node.rank:
                node = node.left
                continue
            _add(total, node.amounts)
            if node.left is not None:
                _add(total, node.left.sums)
            node = node.right
        return total


def _add(sums: dict[Name, int], amounts: Mapping[Name, int]) -> None:
    for name, amount in amounts.items():
        total = sums.get(name, 0) + amount
        if total:
            sums[name] = total
        else:
            sums.pop(name, None)


def _split(node: _Node[Name] | None, rank: Rank) -> tuple[_Node[Name] | None, _Node[Name] | None]:
    """The members of less rank, and the others."""
    if node is None:
        return None, None
    if node.rank < rank:
        node.right, rest = _split(node.right, rank)
        node.add_up()
        return node, rest
    rest, node.left = _split(node.left, rank)
    node.add_up()
    return rest, node


def _join(before: _Node[Name] | None, after: _Node[Name] | None) -> _Node[Name] | None:
    """All members of both; those of `before` have less rank."""
    if before is None or after is None:
        return after if before is None else before
    if before.priority < after.priority:
        before.right = _join(before.right, after)
        before.add_up()
        return before
    after.left = _join(before, after.left)
    after.add_up()
    return after


def _without(node: _Node[Name] | None, rank: Rank) -> _Node[Name] | None:
    """All members but the one of this rank."""
    assert node is not None
    if node.rank == rank:
        return _join(node.left, node.right)
    if rank < node.rank:
        node.left = _without(node.left, rank)
    else:
        node.right = _without(node.right, rank)
    node.add_up()
    return node
