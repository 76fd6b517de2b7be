"""How many bytes of text one token of a tokenizer can represent, where that has a bound."""

from __future__ import annotations

from typing import Any

import msgspec

_NFC_SHRINKS = 3  # canonical composition: at most three bytes become one (three Hangul letters one syllable)
_KEEP_EVERY_BYTE = {"ByteLevel", "Metaspace", "Digits", "Punctuation", "Split"}
_NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}


def _byte_level_letters() -> dict[int, str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + at) for at, byte in enumerate(others)}


BYTE_LEVEL_LETTERS = _byte_level_letters()  # how byte-level vocabularies write bytes


def token_bytes_max(backend: Any) -> int | None:
    """Bytes of text that one token represents at most. None where there is no bound, because the tokenizer drops or
    joins text of any length: whitespace, unknown characters, whole unknown words.

    `backend` is a `tokenizers.Tokenizer`."""
    parts = msgspec.json.decode(backend.to_str())
    shrinks = _shrinks(parts.get("normalizer"))
    added = parts.get("added_tokens") or []
    vocabulary = backend.get_vocab(with_added_tokens=True)
    swallows = any(token["lstrip"] or token["rstrip"] for token in added)
    if shrinks is None or swallows or not _keeps_every_byte(parts.get("pre_tokenizer")) or not vocabulary:
        return None
    byte_level = "ByteLevel" in _kinds(parts.get("pre_tokenizer"))
    if not (_every_byte_has_a_token(vocabulary) if byte_level else parts["model"].get("byte_fallback")):
        return None
    plain = {token["content"] for token in added}
    longest = max(len(name) if byte_level and name not in plain else len(name.encode()) for name in vocabulary)
    return longest * shrinks


def _kinds(part: dict[str, Any] | None) -> set[str]:
    if part is None:
        return set()
    if part["type"] == "Sequence":
        return {kind for one in _members(part) for kind in _kinds(one)}
    return {part["type"]}


def _members(part: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = part.get("pretokenizers") or part.get("normalizers") or []
    return found


def _keeps_every_byte(part: dict[str, Any] | None) -> bool:
    if part is None:
        return True
    if part["type"] == "Sequence":
        return all(map(_keeps_every_byte, _members(part)))
    return part["type"] in _KEEP_EVERY_BYTE and part.get("behavior") != "Removed"


def _shrinks(part: dict[str, Any] | None) -> int | None:
    """By which factor a normalizer may make text shorter; None: without bound."""
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
    """Whether a byte-level vocabulary has each byte that text can have."""
    return all(letter in vocabulary for byte, letter in BYTE_LEVEL_LETTERS.items() if byte not in _NEVER_IN_UTF8)
