"""Documents of random tokens, with the keys under which a pool holds their blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from penstock.core.keys import BlockKey, KeyChain

BLOCK_TOKENS = 256  # LMCache's chunk


@dataclass(slots=True)
class Document:
    """Tokens that the pool holds, and the keys of their blocks."""

    tokens: list[int]
    chain: KeyChain

    @property
    def keys(self) -> list[BlockKey]:
        """Keys of its blocks, in order."""
        return self.chain.keys


def document(root: BlockKey, tokens: int, vocabulary: int, seed: int) -> Document:
    """A document of whole blocks."""
    drawn = np.random.default_rng(seed).integers(0, vocabulary, tokens).tolist()
    chain = KeyChain(root, BLOCK_TOKENS)
    chain.extend(drawn)
    return Document(drawn, chain)
