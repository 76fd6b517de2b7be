"""Block keys: 128-bit prefix hashes, chained over tokens, media, the tenant's salt and the model's fingerprint.

A key names one full block *and everything before it*, so two blocks with one key hold the same KV. It does not depend
on what follows the block, such as a later image of the same chat.
With BLAKE2b a tenant cannot forge another's key; nothing here depends on `PYTHONHASHSEED`.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

BlockKey = bytes
KEY_BYTES = 16
_SPAN = struct.Struct("<qI")  # where it begins, from the block's first token on; bytes of its name


@dataclass(frozen=True, slots=True)
class Span:
    """`length` tokens from `offset` on that are placeholders, of an image for example. `name` identifies the content:
    equal names, equal KV. It is part of the key of every block with one of these tokens, and so is its offset."""

    offset: int
    length: int
    name: bytes


def split_keys(keys: bytes) -> list[BlockKey]:
    """Keys that are concatenated, one by one."""
    return [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]


def root_key(fingerprint: bytes, salt: str) -> BlockKey:
    """The key before the first block: what separates models, layouts and tenants from each other."""
    return hashlib.blake2b(salt.encode(), digest_size=KEY_BYTES, key=fingerprint).digest()


class KeyChain:
    """Prefix hashes of a growing sequence of tokens, some of which may be `spans`: one key for each full block."""

    __slots__ = ("_block_tokens", "_partial", "_spans", "keys", "root")

    def __init__(self, root: BlockKey, block_tokens: int, spans: Iterable[Span] = ()) -> None:
        self._block_tokens = block_tokens
        self._partial: list[int] = []
        self._spans = sorted((span for span in spans if span.length > 0), key=lambda span: span.offset, reverse=True)
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
            if self._spans:
                chunk += self._spans_at(len(self.keys) * size)
            self.keys.append(hashlib.blake2b(chunk, digest_size=KEY_BYTES, key=parent).digest())
            at += size
        del self._partial[:at]
        return self.keys[first_new:]

    def _spans_at(self, first: int) -> bytes:
        """Names of the spans that overlap the block whose first token is `first`; those that end before the
        next block are dropped."""
        last, names = first + self._block_tokens, []
        for span in reversed(self._spans):
            if span.offset >= last:
                break
            if span.offset + span.length > first:
                names.append(_SPAN.pack(span.offset - first, len(span.name)) + span.name)
        while self._spans and self._spans[-1].offset + self._spans[-1].length <= last:
            self._spans.pop()
        return b"".join(names)

    def parent_of(self, index: int) -> BlockKey:
        """Key of the block before block `index`; the root key for block 0."""
        return self.keys[index - 1] if index else self.root


def block_keys(
    tokens: Sequence[int], fingerprint: bytes, salt: str, block_tokens: int, spans: Iterable[Span] = ()
) -> list[BlockKey]:
    """Keys of all full blocks of `tokens`, first block first."""
    chain = KeyChain(root_key(fingerprint, salt), block_tokens, spans)
    return chain.extend(tokens)
