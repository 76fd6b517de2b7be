"""Tokens as bytes: those of a single token, which may be part of a character, and the most that a token represents."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

_NFC_SHRINKS = 3  # canonical composition (NFC): at most three bytes become one (three Hangul letters make one syllable)
_KEEP_EVERY_BYTE = {"ByteLevel", "Metaspace", "Digits", "Punctuation", "Split"}
_NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # SentencePiece's mark for a space


def _byte_level_letters() -> dict[int, str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + at) for at, byte in enumerate(others)}


BYTE_LEVEL_LETTERS = _byte_level_letters()  # how byte-level vocabularies write bytes
_BYTE_OF_LETTER = {letter: byte for byte, letter in BYTE_LEVEL_LETTERS.items()}


def byte_level_bytes(name: str) -> bytes:
    """The bytes of a token in a byte-level vocabulary, from its name. A name with a character outside the byte alphabet
    (only added tokens have one) is taken as text."""
    plain = [byte for letter in name if (byte := _BYTE_OF_LETTER.get(letter)) is not None]
    return bytes(plain) if len(plain) == len(name) else name.encode()


def byte_of_name(name: str) -> int | None:
    """The byte of a token named like <0xE2>; None for any other name."""
    match = _BYTE_TOKEN.fullmatch(name)
    return int(match[1], 16) if match else None


def kinds(part: dict[str, Any] | None) -> list[str]:
    """Types of the steps in a tokenizer's pre-tokenizer, normalizer or decoder, in order."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [kind for one in _members(part) for kind in kinds(one)]
    return [part["type"]]


class TokenPieces:
    """A single token: its bytes and its printable form. Threading: any method may be called from any thread."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
        self._backend = backend
        self._byte_level = False
        self._added: dict[int, str] = {}
        if backend is not None:
            self._byte_level = "ByteLevel" in kinds(msgspec.json.decode(backend.to_str()).get("decoder"))
            self._added = {number: token.content for number, token in backend.get_added_tokens_decoder().items()}

    def name(self, token: int) -> str:
        """The token's name in the vocabulary; empty for an unknown id."""
        if self._backend is not None:
            return self._backend.id_to_token(token) or ""
        return str(self._tokenizer.convert_ids_to_tokens([token])[0] or "")

    def bytes_of(self, token: int) -> bytes:
        """The UTF-8 bytes that the token adds to a text; for a special token, its name."""
        name = self.name(token)
        if token in self._added:
            return name.encode()
        if self._byte_level:
            return byte_level_bytes(name)
        byte = byte_of_name(name)
        return name.replace(_SPACE, " ").encode() if byte is None else bytes([byte])

    def whole(self, tokens: Sequence[int]) -> str:
        """Text of tokens, including special ones."""
        if self._backend is not None:
            text: str = self._backend.decode(list(tokens), skip_special_tokens=False)
            return text
        return str(self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))


def token_bytes_max(backend: Any) -> int | None:
    """The most bytes of text that one token represents. None if unbounded, because the tokenizer drops or joins text of
    any length: whitespace, unknown characters, whole unknown words.

    `backend` is a `tokenizers.Tokenizer`.
    """
    parts = msgspec.json.decode(backend.to_str())
    shrinks = _shrinks(parts.get("normalizer"))
    added = parts.get("added_tokens") or []
    vocabulary = backend.get_vocab(with_added_tokens=True)
    swallows = any(token["lstrip"] or token["rstrip"] for token in added)
    if shrinks is None or swallows or not _keeps_every_byte(parts.get("pre_tokenizer")) or not vocabulary:
        return None
    byte_level = "ByteLevel" in kinds(parts.get("pre_tokenizer"))
    if not (_every_byte_has_a_token(vocabulary) if byte_level else parts["model"].get("byte_fallback")):
        return None
    plain = {token["content"] for token in added}
    longest = max(len(name) if byte_level and name not in plain else len(name.encode()) for name in vocabulary)
    return longest * shrinks


def _members(part: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = next(
        (part[name] for name in ("pretokenizers", "normalizers", "decoders") if part.get(name)), []
    )
    return found


def _keeps_every_byte(part: dict[str, Any] | None) -> bool:
    if part is None:
        return True
    if part["type"] == "Sequence":
        return all(map(_keeps_every_byte, _members(part)))
    return part["type"] in _KEEP_EVERY_BYTE and part.get("behavior") != "Removed"


def _shrinks(part: dict[str, Any] | None) -> int | None:
    """The largest factor by which a normalizer can shorten text; None: unbounded."""
    if part is None or part["type"] in ("Prepend", "ByteLevel"):
        return 1
    if part["type"] == "NFC":
        return _NFC_SHRINKS
    if part["type"] == "Sequence":
        product = 1
        for one in _members(part):
            factor = _shrinks(one)
            if factor is None:
                return None
            product *= factor
        return product
    if part["type"] == "Replace" and (pattern := part["pattern"].get("String")) and part["content"]:
        return -(-len(pattern.encode()) // len(part["content"].encode()))
    return None


def _every_byte_has_a_token(vocabulary: dict[str, int]) -> bool:
    """Whether a byte-level vocabulary covers every byte."""
    return all(letter in vocabulary for byte, letter in BYTE_LEVEL_LETTERS.items() if byte not in _NEVER_IN_UTF8)
