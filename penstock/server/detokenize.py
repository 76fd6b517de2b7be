"""Incremental detokenization: the pieces of text add up to the tokenizer's text of the whole sequence.

Text that may still change is held back: incomplete characters, unfinished runs of byte tokens, spaces that a clean-up
may remove, and text that may become a stop string. Tokens without text never get here (`TokenText` drops them).
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
HELD_MAX = 3  # an incomplete UTF-8 character has at most 3 bytes; each shows as a replacement character
WINDOW_TOKENS_MAX = 64
WINDOW_KEPT_TOKENS = 16  # kept of a window that grew too long; UTF-8 resynchronises after three bytes
RUN_BYTES_MAX = 64  # of one run of byte tokens that is held back
_PRINTABLE = range(0x21, 0x7F)  # bytes that are a character each
_CONTINUATION = range(0x80, 0xC0)  # bytes that never begin a character

Decode = Callable[[Sequence[int]], str]


class TokenDecoder(Protocol):
    """Text of a growing sequence of tokens. `after` may be called once, first: the sequence then continues the given
    tokens, whose text is not returned, except for an incomplete character at their end."""

    def after(self, tokens: Sequence[int]) -> None:
        """Continue these tokens; their text is not returned."""

    def push(self, token: int) -> str:
        """The text that this token makes final."""
        ...

    def flush(self) -> str:
        """The text still held back, at the end of the sequence."""
        ...


class ByteLevelDecoder:
    """For tokenizers whose tokens are UTF-8 bytes (GPT-2, Llama 3, Qwen)."""

    __slots__ = ("_bytes_of", "_utf8")

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def after(self, tokens: Sequence[int]) -> None:
        """Continue these tokens; their text is not returned."""
        self._utf8.decode(b"".join(map(self._bytes_of, tokens[-WINDOW_KEPT_TOKENS:])))

    def push(self, token: int) -> str:
        """The text that this token makes final; empty inside a character."""
        return self._utf8.decode(self._bytes_of(token))

    def flush(self) -> str:
        """The remaining text; an incomplete character becomes U+FFFD."""
        return self._utf8.decode(b"", True)


class IncrementalDecoder:
    """For all other tokenizers. Each token is decoded together with those of the piece before it, because decoders
    depend on neighbouring tokens (leading spaces, joined parts of words, characters split over tokens).

    `byte_of`: tokens that represent one byte each (Llama 2, Gemma). A decoder returns a whole run of them as text, or,
    if one byte does not fit, one replacement character for each; so a run is held back until it ends or breaks. A run
    longer than RUN_BYTES_MAX is returned as text, and what follows counts as a new run.
    """

    __slots__ = ("_byte_of", "_decode", "_emitted", "_fresh", "_run", "_window")

    def __init__(self, decode: Decode, byte_of: Mapping[int, int] | None = None) -> None:
        self._decode = decode
        self._byte_of = byte_of or {}
        self._window: list[int] = []  # the previous piece's tokens, then those of the current piece
        self._fresh = 0  # index in the window of the current piece's first token
        self._emitted = 0  # characters of the window's text that were returned
        self._run: _ByteRun | None = None

    def after(self, tokens: Sequence[int]) -> None:
        """Continue these tokens; their text is not returned."""
        known = list(tokens[-WINDOW_KEPT_TOKENS:])
        held = 0
        if known and known[-1] in self._byte_of:  # a run whose text is out already, except for its last character
            held = _incomplete_bytes([self._byte_of.get(token, 0) for token in known[-HELD_MAX:]])
            self._begin_with(self._byte_token(_PRINTABLE))
        else:
            self._window, self._fresh = known, len(known)
            self._emitted = len(_without_tail(self._decode(known)))
        for token in known[len(known) - held :]:
            self.push(token)

    def push(self, token: int) -> str:
        """The text that this token makes final; empty inside a character."""
        self._window.append(token)
        byte = self._byte_of.get(token)
        if byte is not None:
            return self._push_byte(byte)
        self._run = None
        text = self._decode(self._window)
        complete = not text.endswith(REPLACEMENT)
        piece = self._take(text if complete else _without_tail(text))
        if complete and piece:  # some decoders return nothing for an incomplete character
            self._begin_with(self._window[self._fresh :])
        elif len(self._window) > WINDOW_TOKENS_MAX:
            piece += self._shorten(text)
        return piece

    def flush(self) -> str:
        """The remaining text; an incomplete character becomes U+FFFD."""
        return self._take(self._decode(self._window))

    def _push_byte(self, byte: int) -> str:
        self._run = self._run or _ByteRun()
        self._run.add(byte)
        if self._run.broken:  # a broken run stays broken
            piece = self._take(self._decode(self._window))
            self._begin_with(self._byte_token(_CONTINUATION))
            return piece
        if self._run.bytes < RUN_BYTES_MAX:
            return ""
        end = len(self._window) - self._run.incomplete
        piece, rest = self._take(self._decode(self._window[:end])), self._window[end:]
        self._begin_with(self._byte_token(_PRINTABLE))
        self._window += rest
        self._run = _ByteRun([self._byte_of[token] for token in rest])
        return piece

    def _begin_with(self, context: list[int]) -> None:
        """Start the next piece after these tokens, whose text was returned."""
        self._window, self._fresh = list(context), len(context)
        self._emitted = len(self._decode(self._window))

    def _byte_token(self, wanted: range) -> list[int]:
        """A token for one of these bytes; none if the vocabulary has none."""
        return next(([token] for token, byte in sorted(self._byte_of.items()) if byte in wanted), [])

    def _shorten(self, text: str) -> str:
        """Drop the beginning of a long window; returns text that this forces out."""
        pending = text[self._emitted :]
        window = self._window[-WINDOW_KEPT_TOKENS:]
        shorter = self._decode(window)
        piece = "" if shorter.endswith(pending) else pending
        self._window, self._fresh = window, 0
        self._emitted = len(shorter) - (0 if piece else len(pending))
        return piece

    def _take(self, text: str) -> str:
        piece = text[self._emitted :]
        self._emitted = max(self._emitted, len(text))
        return piece


class _ByteRun:
    """Consecutive byte tokens: whether they can be UTF-8, and how many bytes await the end of a character."""

    __slots__ = ("_utf8", "broken", "bytes")

    def __init__(self, given: Sequence[int] = ()) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self.broken = False
        self.bytes = 0
        for byte in given:
            self.add(byte)

    def add(self, byte: int) -> None:
        self.bytes += 1
        if self.broken:
            return
        try:
            self._utf8.decode(bytes([byte]))
        except UnicodeDecodeError:
            self.broken = True

    @property
    def incomplete(self) -> int:
        return 0 if self.broken else len(self._utf8.getstate()[0])


def _incomplete_bytes(given: Sequence[int]) -> int:
    """How many of the last bytes begin a character that is incomplete."""
    sizes = range(1, len(given) + 1)
    return next((size for size in sizes if _ByteRun(given[-size:]).incomplete == size), 0)


def _without_tail(text: str) -> str:
    """The text without trailing replacement characters that may still become a character."""
    end = len(text)
    while end > 0 and len(text) - end < HELD_MAX and text[end - 1] == REPLACEMENT:
        end -= 1
    return text[:end]


_CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def clean_spaces(text: str) -> str:
    """Remove the spaces before punctuation and English endings, as `clean_up_tokenization_spaces` does."""
    for pattern in _CLEANED:
        text = text.replace(pattern, pattern.strip())
    return text


class CleanedDecoder:
    """Another decoder's text after the tokenizer's clean-up of spaces."""

    __slots__ = ("_held", "_inner")

    def __init__(self, inner: TokenDecoder) -> None:
        self._inner = inner
        self._held = ""

    def after(self, tokens: Sequence[int]) -> None:
        """Continue these tokens; their text is not returned."""
        self._inner.after(tokens)

    def push(self, token: int) -> str:
        """The cleaned text that this token makes final."""
        text = self._held + self._inner.push(token)
        cut = certain_length(text)
        self._held = text[cut:]
        return clean_spaces(text[:cut])

    def flush(self) -> str:
        """The remaining cleaned text."""
        text, self._held = self._held + self._inner.flush(), ""
        return clean_spaces(text)


def certain_length(text: str) -> int:
    """Number of leading characters of `text` whose cleaned form does not depend on what follows."""
    start = len(text)
    if text.endswith((" n", " v", "'v", " r", "'r")):
        start -= 1
    start = _before_joints(text, start)
    if start < len(text) and text[:start].endswith(" n"):  # " n't" up to its quote
        start = _before_joints(text, start - 1)
    spaces = len(text) - start - len(text[start:].lstrip(" "))
    return start + max(spaces - 2, 0)  # only the last two spaces matter: one for a pattern, one that the pattern leaves


def _before_joints(text: str, end: int) -> int:
    while end > 0 and text[end - 1] in " '":
        end -= 1
    return end


class StopFinder:
    """Cuts a growing text before its first stop string; holds back an ending that may become one. "First" is the stop
    string that ends first, so the result does not depend on how the text is divided into pieces."""

    __slots__ = ("_held", "_stops", "stopped")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that cannot belong to a stop string; sets `stopped` when one was found."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """The text still held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
