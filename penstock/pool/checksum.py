"""The checksum of a block: xxh3-64 of its bytes, seeded with its key, so that one block never passes for another."""

from __future__ import annotations

import xxhash

from penstock.core.keys import BlockKey


def checksum_seed(key: BlockKey) -> int:
    """The first 8 bytes of the key as an integer."""
    return int.from_bytes(key[:8], "little")


def block_checksum(key: BlockKey, data: memoryview) -> int:
    """Checksum of all of `data` (exactly the block's `size_bytes`); runs without the GIL."""
    return xxhash.xxh3_64_intdigest(data, checksum_seed(key))
