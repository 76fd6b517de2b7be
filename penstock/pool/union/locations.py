"""Where a union of pools last found each block, and which of its ancestors each child holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.core.keys import BlockKey
from penstock.pool.api import Located

LOCATIONS_MAX = 1 << 18
REFUSED_MAX = 4096  # blocks on children that failed their MAC check; the latest ones


@dataclass(frozen=True, slots=True)
class _Location:
    child: int
    ancestors: tuple[BlockKey | None, ...]  # by child: the last block of the prefix up to this one that it holds


class Locations:
    """The child of each of the `LOCATIONS_MAX` blocks seen last; not thread-safe.

    It also knows the nearest ancestor of a block on each child. A block is sent to a child with that ancestor as its
    parent, so that a child that has only every third block of a prefix still evicts leaves before roots.
    """

    def __init__(self, children: int, capacity: int = LOCATIONS_MAX) -> None:
        self._nowhere: tuple[BlockKey | None, ...] = (None,) * children
        self._capacity = capacity
        self._known: OrderedDict[BlockKey, _Location] = OrderedDict()
        self._refused: OrderedDict[tuple[BlockKey, int], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def add_child(self) -> None:
        """Count one more child; no block is known to lie there yet."""
        self._nowhere = (*self._nowhere, None)

    def find(self, key: BlockKey) -> int | None:
        """Number of the child that a block was last seen at; None when it is not known."""
        location = self._known.get(key)
        return location.child if location is not None else None

    def note_prefix(
        self, keys: Sequence[BlockKey], answers: Sequence[Sequence[Located | None] | None], order: Sequence[int]
    ) -> list[Located | None]:
        """Record the children's answers to one lookup (None: no answer); returns the hits, from the first child in
        `order` where several have a block."""
        answered = [(child, found) for child in order if (found := answers[child]) is not None]
        merged: list[Located | None] = []
        ancestors = list(self._nowhere)
        for at, key in enumerate(keys):
            holders = [(child, hit) for child, found in answered if (hit := found[at]) is not None]
            if self._refused:
                holders = [(child, hit) for child, hit in holders if (key, child) not in self._refused]
            for child, _ in holders:
                ancestors[child] = key
            if holders:
                self._note(key, _Location(holders[0][0], tuple(ancestors)))
                merged.append(holders[0][1])
                continue
            merged.append(None)
            known = self._known.get(key)
            if known is not None and known.child < len(answers) and answers[known.child] is not None:
                del self._known[key]
        return merged

    def parent_on(self, child: int, parent: BlockKey) -> BlockKey:
        """The nearest ancestor, on `child`, of a block with this parent; the parent where none is known."""
        known = self._known.get(parent)
        return (known.ancestors[child] if known is not None and child < len(known.ancestors) else None) or parent

    def note_written(self, key: BlockKey, parent: BlockKey, child: int) -> None:
        """Record a block that was written to a child; its ancestors are those of its parent."""
        known = self._known.get(parent)
        before = known.ancestors if known is not None else ()
        ancestors = [*before, *self._nowhere[len(before) :]]
        ancestors[child] = key
        self._note(key, _Location(child, tuple(ancestors)))
        self._refused.pop((key, child), None)

    def forget(self, key: BlockKey, child: int) -> None:
        """The child does not hold this block (any more)."""
        if self.find(key) == child:
            del self._known[key]

    def refuse(self, key: BlockKey, child: int) -> None:
        """As `forget`; and lookups of the block on this child are misses until it is written there again."""
        self.forget(key, child)
        self._refused[key, child] = None
        self._refused.move_to_end((key, child))
        if len(self._refused) > REFUSED_MAX:
            self._refused.popitem(last=False)

    def _note(self, key: BlockKey, location: _Location) -> None:
        self._known[key] = location
        self._known.move_to_end(key)
        if len(self._known) > self._capacity:
            self._known.popitem(last=False)
