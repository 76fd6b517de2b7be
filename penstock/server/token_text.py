"""Text of tokens, and incremental decoders whose pieces add up to the same text."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from penstock.server.detokenize import (
    RUN_BYTES_MAX,
    WINDOW_KEPT_TOKENS,
    ByteLevelDecoder,
    CleanedDecoder,
    IncrementalDecoder,
    TokenDecoder,
    clean_spaces,
)
from penstock.server.token_bytes import byte_level_bytes, byte_of_name, kinds

LOOKED_BACK_TOKENS_MAX = 256  # of a prompt; few tokens have no text
REPLAYED_TOKENS, REPLAYED_RUN_TOKENS = 24, RUN_BYTES_MAX + 16  # of a prompt, to find what is held back at its end


class TokenText:
    """Text of tokens, equal to the tokenizer's `decode(tokens, skip_special_tokens=True)`. Threading: any method may be
    called from any thread."""

    def __init__(self, tokenizer: Any, lock: threading.Lock) -> None:
        """`lock` is held around calls of a tokenizer that is not thread-safe."""
        self._tokenizer = tokenizer
        self._lock = lock
        self._backend = tokenizer.backend_tokenizer if _decodes_by_backend(tokenizer) else None
        self._cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._without_text = frozenset(tokenizer.all_special_ids)
        self._byte_of: dict[int, int] = {}
        self._byte_level = False
        self._known_bytes: dict[int, bytes] = {}  # cache: bytes of a byte-level vocabulary's tokens
        if self._backend is not None:
            added = self._backend.get_added_tokens_decoder()
            self._without_text = frozenset(number for number, token in added.items() if token.special)
            parts = msgspec.json.decode(self._backend.to_str())
            self._cleans = self._cleans and _may_clean(tokenizer, parts)
            decoders = kinds(parts.get("decoder"))
            self._byte_level = decoders == ["ByteLevel"]
            if "ByteFallback" in decoders:
                self._byte_of = _byte_tokens(self._backend, self._without_text)

    def whole(self, tokens: Sequence[int]) -> str:
        """Text of all these tokens, without special ones."""
        text = self._raw(tokens)
        return clean_spaces(text) if self._cleans else text

    def decoder(self, after: Sequence[int] = ()) -> TokenDecoder:
        """A decoder for tokens that are a text of their own, or that continue the text of other tokens."""
        decoder: TokenDecoder = IncrementalDecoder(self._raw, self._byte_of)
        if self._byte_level:
            decoder = ByteLevelDecoder(self._bytes_of)
        decoder = CleanedDecoder(decoder) if self._cleans else decoder
        if last := self._last_with_text(after, WINDOW_KEPT_TOKENS):
            decoder.after(last)
        return _TextTokensOnly(decoder, self._has_no_text)

    def echo_decoder(self, prompt: Sequence[int]) -> TokenDecoder:
        """The decoder for tokens after `echo_text(prompt)`: both texts together are the text of all tokens."""
        last = self._last_with_text(prompt, LOOKED_BACK_TOKENS_MAX)
        in_run = bool(last) and last[-1] in self._byte_of
        start = max(len(last) - (REPLAYED_RUN_TOKENS if in_run else REPLAYED_TOKENS), 0)
        decoder = self.decoder(last[:start])
        for token in last[start:]:
            decoder.push(token)
        return decoder

    def echo_text(self, prompt: Sequence[int]) -> str:
        """The text of a prompt given as tokens, without an ending that the next tokens may change."""
        decoder = self.decoder()
        return "".join(map(decoder.push, prompt))

    def _last_with_text(self, tokens: Sequence[int], count: int) -> list[int]:
        """The last tokens that have text, at most `count`."""
        found: list[int] = []
        for token in reversed(tokens[-LOOKED_BACK_TOKENS_MAX:]):
            if len(found) == count:
                break
            if not self._has_no_text(token):
                found.append(token)
        return found[::-1]

    def _raw(self, tokens: Sequence[int]) -> str:
        if self._backend is not None:
            text: str = self._backend.decode(list(tokens), skip_special_tokens=True)
            return text
        with self._lock:
            return str(
                self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
            )

    def _has_no_text(self, token: int) -> bool:
        return token in self._without_text or (self._backend is not None and self._backend.id_to_token(token) is None)

    def _bytes_of(self, token: int) -> bytes:
        found = self._known_bytes.get(token)
        if found is None:
            name = self._backend.id_to_token(token) if self._backend is not None else None
            found = self._known_bytes[token] = byte_level_bytes(name or "")
        return found


class _TextTokensOnly:
    """A decoder that skips tokens without text: special ones, and ids outside the vocabulary."""

    __slots__ = ("_has_no_text", "_inner")

    def __init__(self, inner: TokenDecoder, has_no_text: Callable[[int], bool]) -> None:
        self._inner = inner
        self._has_no_text = has_no_text

    def after(self, tokens: Sequence[int]) -> None:
        self._inner.after([token for token in tokens if not self._has_no_text(token)])

    def push(self, token: int) -> str:
        return "" if self._has_no_text(token) else self._inner.push(token)

    def flush(self) -> str:
        return self._inner.flush()


def _decodes_by_backend(tokenizer: Any) -> bool:
    """Whether `decode` is the `tokenizers` library's and not overridden."""
    from transformers import PreTrainedTokenizerFast

    backend = PreTrainedTokenizerFast._decode  # noqa: SLF001 (compared, not called)
    return bool(tokenizer.is_fast) and type(tokenizer)._decode is backend  # noqa: SLF001 (the same)


def _may_clean(tokenizer: Any, parts: dict[str, Any]) -> bool:
    """Whether decoding cleans up spaces. `transformers` ignores the checkpoint's flag for BPE unless asked
    explicitly."""
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    return parts["model"].get("type") != "BPE" or bool(getattr(tokenizer, forced, False))


def _byte_tokens(backend: Any, without_text: frozenset[int]) -> dict[int, int]:
    """The byte of each token named like <0xE2>."""
    found = {}
    for name, number in backend.get_vocab(with_added_tokens=True).items():
        if number not in without_text and (byte := byte_of_name(name)) is not None:
            found[number] = byte
    return found
