"""Where a union of pools last found each block, and of few children which of its ancestors each one has."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.core.keys import BlockKey
from penstock.pool.api import Located

LOCATIONS_MAX = 1 << 19
REFUSED_MAX = 4096  # blocks on children that failed their MAC check; the latest ones


@dataclass(frozen=True, slots=True, eq=False)
class _Location:
    """Compared by identity, so that many can be quickly."""

    child: int
    ancestors: tuple[BlockKey | None, ...]  # by child: the last block of the prefix up to this one that it holds


_Known = dict[BlockKey, _Location]


class Locations:
    """The child of each of the last blocks seen, half of `LOCATIONS_MAX` at least; not thread-safe.

    It also knows the nearest ancestor of a block on each child. A block is sent to a child with that ancestor as its
    parent, so that a child that has only every third block of a prefix still evicts leaves before roots.
    """

    def __init__(self, children: int, capacity: int = LOCATIONS_MAX) -> None:
        self._nowhere: tuple[BlockKey | None, ...] = (None,) * children
        self._capacity = capacity
        self._known: _Known = {}  # the last half
        self._older: _Known = {}  # the half before; forgotten as a whole
        self._found_at: dict[int, _Location] = {}  # by child, without ancestors
        self._refused: OrderedDict[tuple[BlockKey, int], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known.keys() | self._older.keys())

    def add_child(self) -> None:
        """Count one more child; no block is known to lie there yet."""
        self._nowhere = (*self._nowhere, None)

    def find(self, key: BlockKey) -> int | None:
        """Number of the child that a block was last seen at; None when it is not known."""
        location = self._known.get(key) or self._older.get(key)
        return location.child if location is not None else None

    def note_found(
        self, keys: Sequence[BlockKey], hits: Sequence[Located | None], child: int
    ) -> Sequence[Located | None]:
        """Record a child's answer to a lookup, without ancestors; returns the hits that can be used."""
        if self._refused:
            hits = [None if (key, child) in self._refused else hit for key, hit in zip(keys, hits, strict=True)]
        location = self._found_at.setdefault(child, _Location(child, ()))
        if list(map(self._known.get, keys)).count(location) == len(keys) and all(hits):
            return hits  # as the last time
        if not all(hits):  # `None in hits` compares each
            self._known.update((key, location) for key, hit in zip(keys, hits, strict=True) if hit is not None)
            for key, hit in zip(keys, hits, strict=True):
                if hit is None:
                    self.forget(key, child)
        else:
            self._known.update(dict.fromkeys(keys, location))
        self._turn_over()
        return hits

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
            known = self.find(key)
            if known is not None and known < len(answers) and answers[known] is not None:
                self.forget(key, known)
        return merged

    def parent_on(self, child: int, parent: BlockKey) -> BlockKey:
        """The nearest ancestor, on `child`, of a block with this parent; the parent where none is known."""
        known = self._known.get(parent) or self._older.get(parent)
        return (known.ancestors[child] if known is not None and child < len(known.ancestors) else None) or parent

    def note_written(self, key: BlockKey, parent: BlockKey, child: int) -> None:
        """Record a block that was written to a child; its ancestors are those of its parent."""
        known = self._known.get(parent) or self._older.get(parent)
        before = known.ancestors if known is not None else ()
        ancestors = [*before, *self._nowhere[len(before) :]]
        ancestors[child] = key
        self._note(key, _Location(child, tuple(ancestors)))
        self._refused.pop((key, child), None)

    def note_stored(self, key: BlockKey, child: int) -> None:
        """Record a block that was written to a child, without ancestors."""
        self._note(key, self._found_at.setdefault(child, _Location(child, ())))
        self._refused.pop((key, child), None)

    def forget(self, key: BlockKey, child: int) -> None:
        """The child does not hold this block (any more)."""
        if self.find(key) == child:
            self._known.pop(key, None)
            self._older.pop(key, None)

    def refuse(self, key: BlockKey, child: int) -> None:
        """As `forget`; and lookups of the block on this child are misses until it is written there again."""
        self.forget(key, child)
        self._refused[key, child] = None
        self._refused.move_to_end((key, child))
        if len(self._refused) > REFUSED_MAX:
            self._refused.popitem(last=False)

    def _note(self, key: BlockKey, location: _Location) -> None:
        self._turn_over()
        self._known[key] = location

    def _turn_over(self) -> None:
        if len(self._known) >= max(1, self._capacity // 2):
            self._known, self._older = {}, self._known
