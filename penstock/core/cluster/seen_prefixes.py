"""An estimate of what a prompt will hit: prefixes that passed a router before, by hashes of them.

It needs no round trip to the pool, and serves the choice of engines and sides. A wrong estimate costs time, never a
wrong token: engines ask the pool themselves.

A prompt is known by one key for each full segment of SEGMENT_BLOCKS blocks, and one for each block of its first segment
and of what follows its last full one. So a prompt that goes on from an earlier one, or shares a short prefix with it,
has its exact hit; where two prompts part within a later segment, the hit counts up to that segment's begin.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

PrefixKey = bytes
KEYS_MAX = 1 << 20  # about 150 bytes of memory each; of long prompts they stand for sixteen times as many blocks
SEGMENT_BLOCKS = 16


@dataclass(frozen=True, slots=True)
class PrefixKeys:
    """Keys of the prefixes of one prompt, each of everything up to the end of a full block: of the full `segments`, of
    the blocks of the `first` one, and of those after the last full one (`last`; empty where that is the first one).
    `inside` makes those of the blocks of any full segment."""

    prompt_tokens: int
    segments: Sequence[PrefixKey]
    first: Sequence[PrefixKey]
    last: Sequence[PrefixKey]
    inside: Callable[[int], Sequence[PrefixKey]]


class SeenPrefixes:
    """The latest prefixes of all tenants, by `keys_max` keys."""

    def __init__(self, block_tokens: int, keys_max: int = KEYS_MAX) -> None:
        self._block_tokens = block_tokens
        self._keys_max = keys_max
        self._seen: OrderedDict[PrefixKey, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def hit_tokens(self, keys: PrefixKeys) -> int:
        """Tokens of the longest prefix that is known to have been added, in full blocks, less than the whole prompt.
        O(segments)."""
        segments = self._known(keys.segments)
        if segments == 0:
            blocks = self._known(keys.first)
        elif segments == len(keys.segments):
            blocks = self._known(keys.last)
        else:  # another prompt may have ended in this segment
            blocks = self._known(keys.inside(segments))
        hit = (segments * SEGMENT_BLOCKS + blocks) * self._block_tokens
        return max(0, min(hit, keys.prompt_tokens - 1) // self._block_tokens * self._block_tokens)

    def add(self, keys: PrefixKeys) -> None:
        """The KV of a prompt with these keys was computed, and its full blocks go to the pool."""
        seen = self._seen
        for some in (keys.last, keys.segments, keys.first):
            for key in reversed(some):  # so that a prefix outlives what follows it
                seen[key] = None
                seen.move_to_end(key)
        while len(seen) > self._keys_max:
            seen.popitem(last=False)

    def _known(self, keys: Sequence[PrefixKey]) -> int:
        """How many of these, from the first one on, were added; they count as used now."""
        seen = self._seen
        for count, key in enumerate(keys):
            if key not in seen:
                return count
            seen.move_to_end(key)
        return len(keys)
