"""The JSON of answers: whole and in chunks, for completions and for chats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from penstock.engine.api import RequestReport
from penstock.engine.shaping import TokenLogprobs
from penstock.server.generation import Choice, Piece
from penstock.server.logprobs import LogprobsShape


def usage_of(choices: Sequence[Choice], n: int, *, hide_cached_tokens: bool = False) -> dict[str, Any]:
    """OpenAI's usage record; a prompt counts once, however many answers (`n`) it gets. Hidden details are omitted, as
    OpenAI's clients allow, rather than reported as a wrong number."""
    prompts = choices[::n]
    prompt_tokens = sum(len(choice.request.prompt_tokens) for choice in prompts)
    completion_tokens = sum(choice.tokens for choice in choices)
    usage: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    if not hide_cached_tokens:
        cached_tokens = sum(choice.report.cached_tokens for choice in prompts if choice.report is not None)
        usage["prompt_tokens_details"] = {"cached_tokens": cached_tokens}
    return usage


def timing_of(report: RequestReport | None) -> dict[str, Any]:
    """The `penstock` extension: the request's time by stage."""
    return {"report": None if report is None else msgspec.to_builtins(report)}


@dataclass(slots=True)
class Answer:
    """One choice of a complete answer, as it grows."""

    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Append a piece of text with its tokens; the piece may end the choice."""
        self.texts.append(piece.text)
        self.reasoning.append(piece.reasoning)
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        self.finish_reason = piece.finish_reason or self.finish_reason


class Shape:
    """Builds the records of one HTTP request's answer. `prefixes` (completions with `echo`) precede each choice's
    text."""

    def __init__(
        self,
        answer_id: str,
        created: int,
        model: str,
        *,
        chat: bool,
        token_ids: bool,
        include_usage: bool,
        prefixes: Sequence[str] = (),
        logprobs: LogprobsShape | None = None,
    ) -> None:
        kind = ("chat.completion", "chat.completion.chunk") if chat else ("text_completion", "text_completion")
        self._head = {"id": answer_id, "object": kind[0], "created": created, "model": model}
        self._chunk_head = self._head | {"object": kind[1]}
        self._chat = chat
        self._token_ids = token_ids
        self._include_usage = include_usage
        self._prefixes = prefixes
        self._logprobs = logprobs
        self._begun: set[int] = set()

    def whole(self, answers: Sequence[Answer], usage: dict[str, Any], timing: dict[str, Any] | None) -> bytes:
        """The body of an unstreamed answer."""
        choices = []
        for index, answer in enumerate(answers):
            logprobs = self._logprobs and self._logprobs.record(index, answer.logprobs)
            choice: dict[str, Any] = {"index": index, "finish_reason": answer.finish_reason, "logprobs": logprobs}
            text = self._prefix(index) + "".join(answer.texts)
            if self._chat:
                reasoning = _reasoning("".join(answer.reasoning))
                choice["message"] = {"role": "assistant", "content": text, "refusal": None} | reasoning
            else:
                choice["text"] = text
            if self._token_ids:
                choice["token_ids"] = answer.token_ids
            choices.append(choice)
        body = self._head | {"choices": choices, "usage": usage}
        if timing is not None:
            body["penstock"] = timing
        return msgspec.json.encode(body)

    def chunk(self, pieces: Sequence[Piece]) -> bytes:
        """One server-sent event."""
        body: dict[str, Any] = self._chunk_head | {"choices": [self._chunk_choice(piece) for piece in pieces]}
        if self._include_usage:
            body["usage"] = None
        return sse(body)

    def last_chunk(self, usage: dict[str, Any] | None, timing: dict[str, Any] | None) -> bytes:
        """The last event, after all choices have ended: usage and timing if requested."""
        body: dict[str, Any] = self._chunk_head | {"choices": []}
        if usage is not None:
            body["usage"] = usage
        if timing is not None:
            body["penstock"] = timing
        return sse(body)

    def _chunk_choice(self, piece: Piece) -> dict[str, Any]:
        first = piece.index not in self._begun
        self._begun.add(piece.index)
        shape = self._logprobs if piece.logprobs else None
        logprobs = shape and shape.record(piece.index, piece.logprobs)
        choice: dict[str, Any] = {"index": piece.index, "finish_reason": piece.finish_reason, "logprobs": logprobs}
        text = (self._prefix(piece.index) if first else "") + piece.text
        if self._chat:
            delta: dict[str, Any] = {"role": "assistant", "content": text} if first else {"content": text}
            choice["delta"] = (delta if text or first else {}) | _reasoning(piece.reasoning)
        else:
            choice["text"] = text
        if self._token_ids:
            choice["token_ids"] = piece.token_ids
        return choice

    def _prefix(self, index: int) -> str:
        return self._prefixes[index] if self._prefixes else ""


def _reasoning(text: str) -> dict[str, str]:
    """The reasoning under both names that clients look for; nothing for a model without marked reasoning."""
    return {"reasoning_content": text, "reasoning": text} if text else {}


def sse(body: Any) -> bytes:
    """A server-sent event with a JSON body."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


SSE_DONE = b"data: [DONE]\n\n"
