"""Block keys: 128-bit prefix hashes, chained over tokens, the tenant's salt and the model's fingerprint.

A key names one full block *and everything before it*, so two blocks with one key hold the same KV.
BLAKE2b keeps a tenant from forging another's key; nothing here depends on `PYTHONHASHSEED`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

BlockKey = bytes
KEY_BYTES = 16


def root_key(fingerprint: bytes, salt: str) -> BlockKey:
    """The key before the first block: what separates models, layouts and tenants from each other."""
    return hashlib.blake2b(salt.encode(), digest_size=KEY_BYTES, key=fingerprint).digest()


class KeyChain:
    """Prefix hashes of a growing sequence of tokens; one key for each full block so far."""

    __slots__ = ("_block_tokens", "_partial", "keys", "root")

    def __init__(self, root: BlockKey, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._partial: list[int] = []
        self.root = root
        self.keys: list[BlockKey] = []

    def extend(self, tokens: Iterable[int]) -> list[BlockKey]:
        """Append tokens (each 0 <= id < 2**32); returns the keys of the blocks that became full."""
        self._partial.extend(tokens)
        first_new = len(self.keys)
        at, size = 0, self._block_tokens
        while len(self._partial) - at >= size:
            parent = self.keys[-1] if self.keys else self.root
            chunk = array("I", self._partial[at : at + size]).tobytes()
            self.keys.append(hashlib.blake2b(chunk, digest_size=KEY_BYTES, key=parent).digest())
            at += size
        del self._partial[:at]
        return self.keys[first_new:]

    def parent_of(self, index: int) -> BlockKey:
        """Key of the block before block `index`; the root key for block 0."""
        return self.keys[index - 1] if index else self.root


def block_keys(tokens: Sequence[int], fingerprint: bytes, salt: str, block_tokens: int) -> list[BlockKey]:
    """Keys of all full blocks of `tokens`, first block first."""
    chain = KeyChain(root_key(fingerprint, salt), block_tokens)
    return chain.extend(tokens)
