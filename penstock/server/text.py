"""A checkpoint's tokenizer: text and chats to tokens, tokens to text."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.extras import require_extra
from penstock.server.errors import bad_request
from penstock.server.harmony import HarmonyTokens
from penstock.server.template_renderer import CPU_S_MAX, RenderError
from penstock.server.token_bytes import TokenPieces, token_bytes_max
from penstock.server.token_text import TokenText

if TYPE_CHECKING:
    from penstock.server.chat_template import ChatTemplate

log = logging.getLogger(__name__)

RENDERED_CHARACTERS_MAX = 2**26
# with the context's tokens, lengths of text beginnings that reveal a far too long text
PROBES_CHARACTERS_PER_TOKEN = (4, 16)
PROBE_MARGIN_TOKENS = 1024

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
    """The checkpoint's tokenizer cannot be loaded: one line with the folder and the reason."""


class TextTooLong(Exception):
    """The text has more than `limit` tokens, at least `at_least`."""

    def __init__(self, limit: int, at_least: int) -> None:
        super().__init__(f"at least {at_least} tokens, more than {limit}")
        self.at_least = at_least


class TextCodec:
    """Wraps a `transformers` tokenizer. Threading: every method may be called from any thread."""

    def __init__(self, tokenizer: Any, *, render_cpu_s: float = CPU_S_MAX) -> None:
        """`render_cpu_s`: processor time allowed for rendering one chat."""
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._backend = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
        self.token_bytes_max: int | None = None  # bytes of text that one token can represent; None: unbounded
        self.harmony: HarmonyTokens | None = None
        self.pieces = TokenPieces(tokenizer)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            self.token_bytes_max = token_bytes_max(self._backend)
            self.harmony = HarmonyTokens.of(self._backend)
        self.tokens = TokenText(tokenizer, self._lock)
        self._template = _template_of(tokenizer, render_cpu_s)

    @property
    def vocabulary_digest(self) -> str:
        """A hash over every token and its id (32 hex digits); differs if token ids mean different text."""
        digest = hashlib.blake2b(digest_size=16)
        for token, number in sorted(self._tokenizer.get_vocab().items()):
            digest.update(f"{number} {token}\0".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    @property
    def template(self) -> ChatTemplate:
        """The chat template. Raises ApiError(400) if the checkpoint has none."""
        if self._template is None:
            raise bad_request("this checkpoint has no chat template; use /v1/completions", "messages")
        return self._template

    def start(self) -> None:
        """Start the renderer in advance, for the first request."""
        if self._template is not None:
            try:
                self._template.start()
            except RenderError as error:
                log.warning("chats cannot be served now: %s", error)

    def close(self) -> None:
        """Stop rendering; later chats get a 503."""
        if self._template is not None:
            self._template.close()

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Tokens of a text; `special_tokens` adds those that begin or end a sequence. Releases the interpreter lock."""
        if (
            self._backend is not None
        ):  # it changes nothing, so threads need no lock; `encode` would keep the interpreter
            ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=special_tokens)[0].ids
            return ids
        with self._lock:
            return list(self._tokenizer.encode(text, add_special_tokens=special_tokens))

    def encode_within(self, text: str, limit: int, *, special_tokens: bool = True) -> list[int]:
        """`encode` for a text that must fit into `limit` tokens. A text far over the limit is refused cheaply: by its
        size if a token represents a bounded number of bytes, or by the tokens of its beginning. Raises TextTooLong; a
        text slightly over the limit is returned encoded."""
        if self.token_bytes_max is not None and len(text) > limit:
            at_least = -(-len(text.encode("utf-8", "surrogatepass")) // self.token_bytes_max)
            if at_least > limit:
                raise TextTooLong(limit, at_least)
        for probe in (per_token * limit + PROBE_MARGIN_TOKENS for per_token in PROBES_CHARACTERS_PER_TOKEN):
            if len(text) <= 2 * probe:
                break
            beginning = len(self.encode(text[:probe], special_tokens=special_tokens))
            # the rest of the text can merge only with the last few tokens
            if beginning > 2 * limit + PROBE_MARGIN_TOKENS:
                raise TextTooLong(limit, limit + 1)
        return self.encode(text, special_tokens=special_tokens)

    def render_chat(
        self, messages: Sequence[dict[str, Any]], variables: Mapping[str, Any], tools: Sequence[Any] | None = None
    ) -> str:
        """Text of a chat by the checkpoint's template, ending with the beginning of the answer. Raises ApiError(400) if
        there is no template, it does not take a variable, or it cannot render the messages."""
        template = self.template
        checked = template.check_variables(variables)
        return template.render(list(messages), {**checked, "tools": list(tools)} if tools else checked)


def _template_of(tokenizer: Any, render_cpu_s: float) -> ChatTemplate | None:
    """The template for chats without tools; None if there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    from penstock.server.chat_template import ChatTemplate  # jinja2 comes with the tokenizer's packages

    try:
        source = str(tokenizer.get_chat_template())
    except ValueError as error:  # several templates, none of them the default
        log.warning("chats are not served: %s", " ".join(str(error).split()))
        return None
    return ChatTemplate(tokenizer, source, RENDERED_CHARACTERS_MAX, render_cpu_s) if source else None


def load_text_codec(folder: Path) -> TextCodec | None:
    """The tokenizer in a checkpoint's folder; None where there is none. Raises TokenizerError or ExtraMissing."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    require_extra("tokenizer", f"the tokenizer in {folder}")
    from transformers import AutoTokenizer

    try:
        return TextCodec(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TokenizerError(f"the tokenizer in {folder} cannot be loaded: {reason[:500]}") from error
