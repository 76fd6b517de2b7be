"""Token ids to text as they come: incomplete characters are held back, stop strings are found across tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
HELD_MAX = 3  # an incomplete UTF-8 character has at most three bytes, each shown as one replacement character
WINDOW_TOKENS_MAX = 64

Decode = Callable[[Sequence[int]], str]


class IncrementalDecoder:
    """Text of a growing sequence of tokens. Each token is decoded together with those of the piece before it, because
    decoders look at neighbours (leading spaces, characters split over tokens). The pieces add up to the text of
    the whole sequence."""

    __slots__ = ("_decode", "_emitted", "_fresh", "_window")

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []  # tokens of the piece before, then fresh ones
        self._fresh = 0  # index in the window of the first token of the piece under way
        self._emitted = 0  # characters of the window's text that were given out

    def push(self, token: int) -> str:
        """The text that became certain with this token; empty while a character is incomplete."""
        self._window.append(token)
        text = self._decode(self._window)
        complete = not text.endswith(REPLACEMENT)
        piece = self._take(text if complete else _without_tail(text))
        if complete or len(self._window) > WINDOW_TOKENS_MAX:
            if not complete:
                piece += self._take(text)
            self._window = self._window[self._fresh :]
            self._fresh = len(self._window)
            self._emitted = len(self._decode(self._window))
        return piece

    def flush(self) -> str:
        """What was held back, at the end of the sequence."""
        return self._take(self._decode(self._window))

    def _take(self, text: str) -> str:
        piece = text[self._emitted :]
        self._emitted = max(self._emitted, len(text))
        return piece


def _without_tail(text: str) -> str:
    """The text without the replacement characters at its end that may yet become a character."""
    end = len(text)
    while end > 0 and len(text) - end < HELD_MAX and text[end - 1] == REPLACEMENT:
        end -= 1
    return text[:end]


class StopFinder:
    """Cuts a growing text before the first stop string in it; holds back an end that may become one."""

    __slots__ = ("_held", "_stops", "stopped")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certain not to belong to a stop string; `stopped` is set when one was found."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
