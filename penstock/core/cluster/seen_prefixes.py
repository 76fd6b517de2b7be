"""An estimate of what a prompt will hit: prefixes that passed a router before, as hashes of their full blocks.

It needs no round trip to the pool, and serves the choice of engines and sides. A wrong estimate costs time, never a
wrong token: engines ask the pool themselves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from penstock.core.keys import BlockKey, block_keys

BLOCKS_MAX = 1 << 20  # about 150 bytes of memory each


class SeenPrefixes:
    """The latest `blocks_max` blocks of all tenants, by their keys: `keys_of` says those of a prompt, and takes long
    where that is long; it may be called on any thread."""

    def __init__(self, block_tokens: int, blocks_max: int = BLOCKS_MAX) -> None:
        self._block_tokens = block_tokens
        self._blocks_max = blocks_max
        self._seen: OrderedDict[BlockKey, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def keys_of(self, tokens: Sequence[int], tenant: str) -> list[BlockKey]:
        """Of a prompt's full blocks."""
        return block_keys(tokens, b"seen prefixes", tenant, self._block_tokens)

    def hit_tokens(self, keys: Sequence[BlockKey], prompt_tokens: int) -> int:
        """Tokens of the longest prefix that was added before, in full blocks, less than all `prompt_tokens`."""
        blocks = 0
        for key in keys:
            if key not in self._seen:
                break
            self._seen.move_to_end(key)
            blocks += 1
        return max(0, min(blocks * self._block_tokens, prompt_tokens - 1) // self._block_tokens * self._block_tokens)

    def add(self, keys: Sequence[BlockKey]) -> None:
        """The KV of a prompt with these keys was computed, and its full blocks go to the pool."""
        for key in reversed(keys):  # so that a prefix outlives what follows it
            self._seen[key] = None
            self._seen.move_to_end(key)
        while len(self._seen) > self._blocks_max:
            self._seen.popitem(last=False)
