"""A checkpoint's tokenizer as the server uses it: text and chats to tokens, tokens to text."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from penstock.server.errors import bad_request

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)


class TokenizerError(ValueError):
    """The checkpoint has a tokenizer that cannot be loaded: one line that says what and where."""


class TextCodec:
    """Wraps a `transformers` tokenizer. Threading: every method may be called from any thread."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._backend = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Tokens of a text; `special_tokens` adds those that begin or end a sequence."""
        if self._backend is not None:  # its encode changes nothing, so threads need no lock
            ids: list[int] = self._backend.encode(text, add_special_tokens=special_tokens).ids
            return ids
        with self._lock:
            return list(self._tokenizer.encode(text, add_special_tokens=special_tokens))

    def encode_chat(self, messages: Sequence[dict[str, Any]], variables: dict[str, Any]) -> list[int]:
        """Tokens of a chat by the checkpoint's template, with the beginning of an answer.
        Raises ApiError(400) when there is no template or it refuses the messages."""
        if not self.has_chat_template:
            raise bad_request("this checkpoint has no chat template; use /v1/completions", "messages")
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, **variables
            )
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise bad_request(f"the chat template refused the messages: {reason[:500]}", "messages") from error
        return self.encode(text, special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, without special ones."""
        if self._backend is not None:
            text: str = self._backend.decode(list(tokens), skip_special_tokens=True)
            return text
        with self._lock:
            return str(
                self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
            )


def load_text_codec(folder: Path) -> TextCodec | None:
    """The tokenizer in a checkpoint's folder; None when the checkpoint has none. Raises TokenizerError."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return TextCodec(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TokenizerError(f"the tokenizer in {folder} cannot be loaded: {reason[:500]}") from error
