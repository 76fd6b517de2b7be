"""Types with bounds for the cluster's messages: a message out of bounds ends its connection, with one log line.

msgspec checks them when it decodes; NaN is out of every bound. Senders cut texts (`clip`) and clip measurements
(`within`), so that no message of Penstock itself is refused.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from penstock.core.packed_tokens import TOKEN_BYTES

SECONDS_MAX = 1e6
RATE_MAX = 1e18  # bytes or tokens per second
COUNT_MAX = 1 << 53
TEXT_CHARACTERS_MAX = 4096
NAME_CHARACTERS_MAX = 512
TENANT_CHARACTERS_MAX = 4096
TOKENS_MAX = 1 << 23
LIST_MAX = 65_536

Seconds = Annotated[float, Meta(ge=0.0, le=SECONDS_MAX)]
LeaseSeconds = Annotated[float, Meta(ge=0.001, le=3600.0)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Rate = Annotated[float, Meta(ge=0.0, le=RATE_MAX)]
Count = Annotated[int, Meta(ge=0, le=COUNT_MAX)]
Number = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]  # epochs, attempts, sequences
Token = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Tokens = Annotated[list[Token], Meta(max_length=TOKENS_MAX)]
PackedTokens = Annotated[bytes, Meta(max_length=TOKEN_BYTES * TOKENS_MAX)]  # `pack_tokens`
Name = Annotated[str, Meta(max_length=NAME_CHARACTERS_MAX)]
Tenant = Annotated[str, Meta(max_length=TENANT_CHARACTERS_MAX)]
Text = Annotated[str, Meta(max_length=TEXT_CHARACTERS_MAX)]
Digest = Annotated[bytes, Meta(min_length=16, max_length=16)]


def clip(text: str) -> str:
    """Cut a text to TEXT_CHARACTERS_MAX characters, and replace those that cannot be encoded."""
    return text[:TEXT_CHARACTERS_MAX].encode(errors="replace").decode()


def within(value: float, most: float) -> float:
    """Clip a measured value to 0 to `most`; 0 for NaN."""
    return min(max(value, 0.0), most) if value == value else 0.0
