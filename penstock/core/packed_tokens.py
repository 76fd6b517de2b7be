"""Token ids as bytes: as prompts are sent between processes, and hashed."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

TOKEN_BYTES = 4


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """TOKEN_BYTES for each token, little-endian. Raises OverflowError for a negative number or one of more bits, and
    TypeError for what is no integer."""
    return _little_endian(array("I", tokens)).tobytes()


def unpack_tokens(packed: bytes) -> list[int]:
    """The tokens of `pack_tokens`."""
    return _little_endian(array("I", packed)).tolist()


def _little_endian(tokens: array[int]) -> array[int]:
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens
