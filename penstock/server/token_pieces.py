"""One token by itself: its bytes, which need not be whole characters, and how it is shown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from penstock.server.token_bytes import BYTE_LEVEL_LETTERS

_BYTE_OF_LETTER = {letter: byte for byte, letter in BYTE_LEVEL_LETTERS.items()}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # what SentencePiece writes for a space


class TokenPieces:
    """Threading: every method may be called from any thread."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
        self._backend = backend
        self._byte_level = False
        self._added: dict[int, str] = {}
        if backend is not None:
            self._byte_level = "ByteLevel" in _kinds(msgspec.json.decode(backend.to_str()).get("decoder"))
            self._added = {number: token.content for number, token in backend.get_added_tokens_decoder().items()}

    def name(self, token: int) -> str:
        """As the vocabulary writes it; empty for an id that it does not have."""
        if self._backend is not None:
            return self._backend.id_to_token(token) or ""
        return str(self._tokenizer.convert_ids_to_tokens([token])[0] or "")

    def bytes_of(self, token: int) -> bytes:
        """What it adds to a text in UTF-8; of a special token, its name."""
        name = self.name(token)
        if token in self._added:
            return name.encode()
        if self._byte_level:
            plain = [byte for letter in name if (byte := _BYTE_OF_LETTER.get(letter)) is not None]
            return bytes(plain) if len(plain) == len(name) else name.encode()
        if match := _BYTE_TOKEN.fullmatch(name):
            return bytes([int(match[1], 16)])
        return name.replace(_SPACE, " ").encode()

    def whole(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones included."""
        if self._backend is not None:
            text: str = self._backend.decode(list(tokens), skip_special_tokens=False)
            return text
        return str(self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))


def _kinds(part: dict[str, Any] | None) -> set[str]:
    if part is None:
        return set()
    if part["type"] == "Sequence":
        return {kind for one in part["decoders"] for kind in _kinds(one)}
    return {part["type"]}
