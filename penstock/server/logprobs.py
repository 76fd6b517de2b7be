"""The JSON of logprobs: OpenAI's for chats, and its older one for completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from penstock.engine.shaping import TokenLogprobs
from penstock.server.token_bytes import TokenPieces


class LogprobsShape:
    """For the choices of one answer. Without `pieces` (no tokenizer), tokens appear as `token_id:ID`."""

    def __init__(self, pieces: TokenPieces | None, *, chat: bool) -> None:
        self._pieces = pieces
        self._chat = chat
        self._offsets: dict[int, int] = {}  # by choice: characters of the tokens shown so far

    def record(self, index: int, said: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """The JSON for the tokens that the choice `index` gained."""
        return self._chat_record(said) if self._chat else self._completion_record(index, said)

    def _chat_record(self, said: Sequence[TokenLogprobs]) -> dict[str, Any]:
        content = []
        for one in said:
            top = [self._entry(token, logprob) for token, logprob in one.top]
            content.append(self._entry(one.token_id, one.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._pieces.bytes_of(token) if self._pieces is not None else None
        return {"token": self._shown(token), "logprob": logprob, "bytes": None if raw is None else list(raw)}

    def _completion_record(self, index: int, said: Sequence[TokenLogprobs]) -> dict[str, Any]:
        offset, offsets = self._offsets.get(index, 0), []
        top: list[dict[str, float]] = []
        tokens = [self._shown(one.token_id) for one in said]
        for one, token in zip(said, tokens, strict=True):
            offsets.append(offset)
            offset += len(token)
            likeliest: dict[str, float] = {}
            for other, logprob in one.top:
                likeliest.setdefault(self._shown(other), logprob)  # of two tokens with the same text, the likelier
            top.append({token: one.logprob} | likeliest)
        self._offsets[index] = offset
        logprobs = [one.logprob for one in said]
        return {"text_offset": offsets, "token_logprobs": logprobs, "tokens": tokens, "top_logprobs": top}

    def _shown(self, token: int) -> str:
        return f"token_id:{token}" if self._pieces is None else self._pieces.bytes_of(token).decode(errors="replace")
