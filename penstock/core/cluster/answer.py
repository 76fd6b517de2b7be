"""One answer, assembled from the tokens of its engines: parts, attempts, order of tokens, and restarts.

ANSWER-1  A token counts once, at its index, from an engine of the current attempt. Everything else is dropped.
ANSWER-2  Tokens are sent in order: those of a decode engine wait for the prefill engine's first one.
ANSWER-3  A part that ends through no fault of the request, or whose engine is lost, leads to a new attempt. Its prompt
          is the prompt and all tokens that were sent. A prefill engine whose hand-off is complete is not needed.
ANSWER-4  Attempts are bounded; after the last one the answer ends with an error.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from penstock.core.operations import FinishReason

Part = Literal["mixed", "prefill", "decode"]
ATTEMPTS_MAX = 12


@dataclass(frozen=True, slots=True)
class Outcome:
    """What follows an event: `tokens` to send; `end` with its error, or `restart` with its reason; `cancel`: engines
    whose part of this attempt is not needed any more."""

    tokens: tuple[int, ...] = ()
    end: FinishReason | None = None
    error: str | None = None
    restart: str | None = None
    cancel: tuple[str, ...] = ()


@dataclass(slots=True)
class Answer:
    """`max_tokens` may be generated in all; a token of `end_tokens` is the last one. `tokens` went out."""

    max_tokens: int
    end_tokens: Collection[int] = ()
    attempt: int = 0
    tokens: list[int] = field(default_factory=list)
    parts: dict[str, Part] = field(default_factory=dict)  # what each engine still has to do for this attempt
    attempts: int = 0
    restarts: int = 0
    _ahead: dict[int, int] = field(default_factory=dict)
    _closing: tuple[FinishReason, str | None] | None = None  # the last token's part ended; earlier tokens are missing

    def begin(self, parts: Mapping[str, Part]) -> int:
        """A new attempt by these engines; returns its number."""
        assert not self.parts, "an attempt is under way"
        self.attempt += 1
        self.attempts += 1
        self.parts = dict(parts)
        self._ahead.clear()
        self._closing = None
        return self.attempt

    def resume(self, attempt: int, parts: Mapping[str, Part], held: Sequence[tuple[int, Sequence[int]]]) -> bool:
        """Go on with an attempt that engines were at before: their tokens as (index of the first, tokens). False when
        tokens are missing between those that they have."""
        self.attempt, self.attempts = attempt, self.attempts + 1
        self.parts = dict(parts)
        for index, tokens in held:
            self._buffer(index, tokens)
        self.tokens += self._in_order()
        return not self._ahead

    def add(self, engine: str, attempt: int, index: int, tokens: Sequence[int]) -> Outcome:
        """Tokens that an engine generated, the first of them at `index` of the answer."""
        if attempt != self.attempt or engine not in self.parts:
            return Outcome()
        self._buffer(index, tokens)
        fresh = self._in_order()
        self.tokens += fresh
        if self._closing is not None and not self._ahead:
            reason, error = self._closing
            return Outcome(tuple(fresh), reason, error, cancel=self._others(engine))
        return Outcome(tuple(fresh))

    def part_ended(self, engine: str, attempt: int, reason: FinishReason, error: str | None) -> Outcome:
        """An engine's part has ended; its tokens were added before."""
        part = self.parts.get(engine)
        if attempt != self.attempt or part is None:
            return Outcome()
        if reason == "handed_over":
            del self.parts[engine]
            return Outcome()
        others = self._others(engine)
        if reason in ("stop", "length"):
            if self._ahead or (part == "decode" and not self.tokens and "prefill" in self.parts.values()):
                self._closing = (reason, error)
                return Outcome()
            return Outcome((), reason, error, cancel=others)
        if reason in ("error", "timeout"):
            return Outcome((), reason, error, cancel=others)
        return self._again(error or f"the {part} part ended as {reason}", others)

    def engine_lost(self, engine: str, why: str) -> Outcome:
        """An engine left the cluster or was fenced: what it has not sent is lost."""
        if engine not in self.parts:
            return Outcome()
        others = self._others(engine)
        return self._again(f"engine {engine} is lost: {why}", others)

    def revoked(self, why: str) -> Outcome:
        """Whoever placed the attempt takes it back: another one follows."""
        return self._again(why, tuple(self.parts))

    def complete(self) -> FinishReason | None:
        """Why the answer is whole, although no engine said so; None when it is not."""
        if self.tokens and self.tokens[-1] in self.end_tokens:
            return "stop"
        return "length" if len(self.tokens) >= self.max_tokens else None

    def _again(self, why: str, others: tuple[str, ...]) -> Outcome:
        self.parts.clear()
        self._ahead.clear()
        self._closing = None
        whole = self.complete()
        if whole is not None:
            return Outcome((), whole, cancel=others)
        if self.attempts >= ATTEMPTS_MAX:
            return Outcome((), "error", f"given up after {self.attempts} attempts; the last: {why}", cancel=others)
        self.restarts += 1
        return Outcome(restart=why, cancel=others)

    def _others(self, engine: str) -> tuple[str, ...]:
        return tuple(name for name in self.parts if name != engine)

    def _buffer(self, index: int, tokens: Sequence[int]) -> None:
        """Tokens beyond what may be generated, and those that went out, are dropped."""
        for at, token in enumerate(tokens, index):
            if len(self.tokens) <= at < self.max_tokens:
                self._ahead[at] = token

    def _in_order(self) -> list[int]:
        fresh: list[int] = []
        at = len(self.tokens)
        while at in self._ahead:
            fresh.append(self._ahead.pop(at))
            at += 1
        return fresh
