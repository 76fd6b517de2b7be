"""Blocks that the pool was last seen to hold, so that none of them is written a second time."""

from __future__ import annotations

from collections import OrderedDict

from penstock.core.keys import BlockKey


class SeenBlocks:
    """The latest `blocks_max` of them. The pool may have dropped one since: then it is a miss at its next lookup, and
    written anew when it was computed."""

    def __init__(self, blocks_max: int) -> None:
        self._blocks_max = blocks_max
        self._seen: OrderedDict[BlockKey, int] = OrderedDict()  # the operation that said so

    def __len__(self) -> int:
        return len(self._seen)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._seen

    def add(self, key: BlockKey, op_id: int) -> None:
        """The pool holds it as a Lookup said, or gets it with a Save. Operations are numbered in order."""
        self._seen[key] = op_id
        self._seen.move_to_end(key)
        if len(self._seen) > self._blocks_max:
            self._seen.popitem(last=False)

    def missed(self, key: BlockKey, op_id: int) -> None:
        """A Lookup did not find it; that says nothing of a Save that began later."""
        if self._seen.get(key, op_id) < op_id:
            del self._seen[key]

    def discard(self, key: BlockKey) -> None:
        """The pool could not give it, or did not take it."""
        self._seen.pop(key, None)
