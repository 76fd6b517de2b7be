"""How the KV of one block lies in memory: bytes per layer, offsets, and the fingerprint of both model and layout."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

STAGING_ALIGNMENT_BYTES = 4096  # what direct I/O asks of addresses, lengths and offsets


def staging_bytes(size_bytes: int) -> int:
    """Bytes that a block of `size_bytes` takes in staging memory and on devices: rounded up to the alignment."""
    return -(-size_bytes // STAGING_ALIGNMENT_BYTES) * STAGING_ALIGNMENT_BYTES


@dataclass(frozen=True)
class KVLayout:
    """Byte layout of KV blocks: a full block is `[layer, token, byte]`, a layer block is one layer of it.

    `layer_bytes_per_token[l]` is what one token of layer l takes (keys, then values, of all KV heads);
    layers may differ in width.
    """

    block_tokens: int
    layer_bytes_per_token: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.block_tokens < 1:
            raise ValueError(f"block_tokens is {self.block_tokens}; it must be at least 1")
        if not self.layer_bytes_per_token or min(self.layer_bytes_per_token) < 1:
            raise ValueError("layer_bytes_per_token needs at least one layer, each of at least 1 byte")

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.layer_bytes_per_token)

    @cached_property
    def bytes_per_token(self) -> int:
        """Bytes of KV that one token takes over all layers."""
        return sum(self.layer_bytes_per_token)

    @cached_property
    def full_block_bytes(self) -> int:
        """Bytes of one full block: all layers of `block_tokens` tokens."""
        return self.block_tokens * self.bytes_per_token

    def layer_block_bytes(self, layer: int) -> int:
        """Bytes of one layer block."""
        return self.block_tokens * self.layer_bytes_per_token[layer]

    @cached_property
    def layer_offsets(self) -> tuple[int, ...]:
        """Byte offset of each layer block inside a full block."""
        offsets, at = [], 0
        for layer in range(self.layers):
            offsets.append(at)
            at += self.layer_block_bytes(layer)
        return tuple(offsets)

    def fingerprint(self, model: str) -> bytes:
        """16 bytes that differ whenever `model` (an identity of config and weights) or this layout differs."""
        text = f"penstock-kv-1|{model}|{self.block_tokens}|{self.layer_bytes_per_token}|{self.dtype}"
        return hashlib.blake2b(text.encode(), digest_size=16).digest()
