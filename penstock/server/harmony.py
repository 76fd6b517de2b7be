"""GPT-OSS answers in channels: `<|channel|>analysis<|message|>...<|end|>` is reasoning, `final` the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from penstock.server.detokenize import TokenDecoder
from penstock.server.token_text import TokenText

HEADER_TOKENS_MAX = 64

Destination = Literal["content", "reasoning"]


@dataclass(frozen=True, slots=True)
class HarmonyTokens:
    """Ids of the special tokens that structure an answer."""

    start: int
    channel: int
    message: int
    ends: frozenset[int]  # <|end|>, <|return|>, <|call|>: those that the vocabulary has

    @classmethod
    def of(cls, tokenizer: Any) -> HarmonyTokens | None:
        """The ids in a `tokenizers.Tokenizer`; None if it does not have this format."""
        special = {token.content: at for at, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        ends = frozenset(special[name] for name in ("<|end|>", "<|return|>", "<|call|>") if name in special)
        try:
            return cls(special["<|start|>"], special["<|channel|>"], special["<|message|>"], ends)
        except KeyError:
            return None


class ChannelSplitter:
    """Splits a growing answer into reasoning and content, token by token. An answer that does not begin with a channel
    is content, and so is every channel except `analysis` and tool calls (`commentary to=...`)."""

    __slots__ = ("_decoder", "_destination", "_header", "_text", "_tokens")

    def __init__(self, tokens: HarmonyTokens, text: TokenText) -> None:
        self._tokens = tokens
        self._text = text
        self._decoder: TokenDecoder = text.decoder()
        self._destination: Destination = "content"
        self._header: list[int] | None = None  # of a message that begins; None inside a message

    def push(self, token: int) -> tuple[Destination, str]:
        """The text that this token makes final, and the kind of text it belongs to."""
        tokens = self._tokens
        if token in (tokens.start, tokens.channel):
            held = self.flush()
            if token == tokens.start or self._header is None:
                self._header = []
            return held
        if token == tokens.message:
            held = self.flush()
            self._begin_message()
            return held
        if token in tokens.ends:
            held = self.flush()
            self._header, self._destination = None, "content"
            return held
        if self._header is None:
            return self._destination, self._decoder.push(token)
        self._header.append(token)
        if len(self._header) > HEADER_TOKENS_MAX:  # not a header after all: output it, so that no text is lost
            text, self._header = self._text.whole(self._header), None
            return "content", text
        return "content", ""

    def flush(self) -> tuple[Destination, str]:
        """The text still held back of the current message."""
        held = self._destination, self._decoder.flush()
        self._decoder = self._text.decoder()
        return held

    def _begin_message(self) -> None:
        header = self._text.whole(self._header or [])
        self._header = None
        words = header.removeprefix("assistant").split()
        is_call = any(word.startswith("to=") for word in words)
        self._destination = "reasoning" if is_call or "analysis" in words else "content"
