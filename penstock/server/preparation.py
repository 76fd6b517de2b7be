"""From a request body to an engine request: read, parse, render, tokenize, check; every step is bounded.

Nothing here blocks the event loop: bodies beyond INLINE_BYTES are parsed on a thread, chats are rendered in other
processes, and text is tokenized on threads that release the interpreter lock. Short texts have their own thread, so
that they do not wait for long ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from penstock.core.packed_tokens import pack_tokens
from penstock.engine.api import EngineAPI, highest_token
from penstock.server.bodies import BodyBudget, BodyLease, has_more_than, read_body
from penstock.server.errors import ApiError, bad_request, context_overflow, wrong_value
from penstock.server.schema import (
    ChatBody,
    CompletionBody,
    GenerationBody,
    Options,
    chat_messages,
    check_options,
    decode_body,
    prompts_of,
    template_variables,
)
from penstock.server.settings import ServerSettings
from penstock.server.template_renderer import PROCESSES
from penstock.server.text import TextCodec, TextTooLong
from penstock.server.work_threads import TooMuchWork, WorkThreads

COMPLETION_MAX_TOKENS = 16  # the OpenAI API's default for completions; chats may fill the context
INLINE_BYTES = 2**13  # larger bodies are not parsed on the event loop
SHORT_CHARACTERS = 2**16
BODY_BYTES_MIN = 4 * 2**20  # allowed however short the context is
ID_BYTES = 12  # of a token id in JSON, with its separator
ESCAPED = 6  # JSON bytes for one byte of text that is written as \\u0061
CONTAINERS_MIN, CONTAINERS_MAX = 1024, 2**15  # objects and lists in one body: messages, their parts, tool calls
VALUES_MIN = 2**20
LONG_THREADS = 2
WAITING_MAX = 1024

B = TypeVar("B", bound=msgspec.Struct)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked request, ready to submit."""

    options: Options
    prompts: list[list[int]]
    packed: list[bytes]  # `pack_tokens` of each prompt
    max_tokens: list[int]
    prefixes: tuple[str, ...]  # text echoed before each completion: as sent, or the decoded prompt tokens
    chat: bool
    echo_tokens: bool = False  # the prompts were token ids and are echoed


class RequestPreparation:
    """Lives on one event loop. `close` ends its threads."""

    def __init__(self, engine: EngineAPI, codec: TextCodec | None, settings: ServerSettings) -> None:
        self.settings = settings
        self.bodies = BodyBudget(settings.open_bodies_bytes_max)
        self._engine = engine
        self._codec = codec
        self._parsing = WorkThreads("parse", 1, WAITING_MAX)
        self._rendering = WorkThreads("render", PROCESSES, WAITING_MAX)
        self._short_texts = WorkThreads("tokenize-short", 1, WAITING_MAX)
        self._long_texts = WorkThreads("tokenize", LONG_THREADS, WAITING_MAX)

    def close(self) -> None:
        """End the threads after their queued work, without waiting for them."""
        for threads in (self._parsing, self._rendering, self._short_texts, self._long_texts):
            threads.stop()

    async def read(self, request: Request, kind: type[B], lease: BodyLease) -> B:
        """Read and parse the request's body. Raises ApiError."""
        return await self.parse(await self.read_raw(request, kind, lease), kind)

    async def read_raw(self, request: Request, kind: type[msgspec.Struct], lease: BodyLease) -> bytes:
        """Read the request's body. Raises ApiError."""
        limit, too_large = self._body_limit(request, kind)
        return await read_body(request, limit, too_large, self.settings.body_timeout_s, lease)

    async def parse(self, raw: bytes, kind: type[B]) -> B:
        """Parse a body. Raises ApiError."""
        if len(raw) <= INLINE_BYTES:
            return self._parse(raw, kind)
        return await _on(self._parsing, partial(self._parse, raw, kind))

    async def prepare(
        self, request: Request, body: GenerationBody, tenant: str, tools: Sequence[Any] | None = None
    ) -> Prepared:
        """Check the request and tokenize its prompts. `tenant` is that of the request's key; `tools` are given to the
        chat template. Raises ApiError."""
        default = COMPLETION_MAX_TOKENS if isinstance(body, CompletionBody) else None
        vocab_size = self._engine.vocab_size
        options = check_options(body, request.headers, default, self.settings, tenant, vocab_size=vocab_size)
        if options.stop and self._codec is None:
            raise bad_request("stop needs a tokenizer, and this checkpoint has none", "stop")
        chat = isinstance(body, ChatBody)
        prefixes: tuple[str, ...] = ()
        echo_tokens = False
        if isinstance(body, ChatBody):
            self._check_choices(1, options)
            prompts = [await self.chat_tokens(body, tools=tools)]
        else:
            assert isinstance(body, CompletionBody)
            given = prompts_of(body)
            self._check_choices(len(given), options)
            prompts, prefixes = await self._completion_tokens(given, bool(body.echo))
            echo_tokens = bool(body.echo) and not isinstance(given[0], str)
        param = "messages" if chat else "prompt"
        packed, room = [], []
        for tokens in prompts:
            packed.append(self._check_tokens(tokens, param))
            room.append(self._room(len(tokens), options, param))
        return Prepared(options, prompts, packed, room, prefixes, chat, echo_tokens)

    # -- bodies -------------------------------------------------------------------------------------------------

    def _body_limit(self, request: Request, kind: type[msgspec.Struct]) -> tuple[int, ApiError]:
        """The body's size limit in bytes, and the error for a larger body."""
        context = self._engine.max_context_tokens
        per_token = (self._codec.token_bytes_max if self._codec is not None else 0) or ID_BYTES
        limit = max(context * max(per_token, ID_BYTES) * ESCAPED, BODY_BYTES_MIN)
        if limit < self.settings.body_bytes_max:
            param = "messages" if kind is ChatBody else "prompt"
            return limit, context_overflow(context, f"the request's body has more than {limit} bytes", param)
        limit = self.settings.body_bytes_max
        return limit, ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")

    def _parse(self, raw: bytes, kind: type[B]) -> B:
        context = self._engine.max_context_tokens
        containers_max = min(context + CONTAINERS_MIN, CONTAINERS_MAX)
        if too_many := has_more_than(raw, containers_max, max(VALUES_MIN, 2 * context)):
            param = "messages" if kind is ChatBody else "prompt"
            raise context_overflow(context, f"the request's body has {too_many}", param)
        return decode_body(raw, kind)

    # -- tokens -------------------------------------------------------------------------------------------------

    @property
    def max_context_tokens(self) -> int:
        """The engine's limit of tokens for prompt and answer together."""
        return self._engine.max_context_tokens

    async def text_tokens(self, text: str, *, special_tokens: bool) -> list[int]:
        """Tokenize a text. Raises ApiError, also for a text that is far longer than the context."""
        return await self._tokens_of(self._need_codec("prompt"), text, "prompt", special_tokens=special_tokens)

    async def text_of(self, tokens: Sequence[int]) -> str:
        """The text of tokens, including special ones. Raises ApiError."""
        codec = self._need_codec("tokens")
        if tokens:
            self._check_tokens(tokens, "tokens")
        return await _on(self._long_texts, partial(codec.pieces.whole, tokens))

    async def token_names(self, tokens: Sequence[int]) -> list[str]:
        """The tokens' names in the vocabulary. Raises ApiError."""
        name = self._need_codec("prompt").pieces.name
        return await _on(self._long_texts, lambda: [name(token) for token in tokens])

    async def chat_tokens(
        self, body: ChatBody, *, special_tokens: bool = False, tools: Sequence[Any] | None = None
    ) -> list[int]:
        """The tokens of messages, by the checkpoint's chat template. Raises ApiError."""
        codec = self._need_codec("messages")
        variables = template_variables(body, codec.template.variables)
        text = await _on(self._rendering, lambda: codec.render_chat(chat_messages(body), variables, tools))
        return await self._tokens_of(codec, text, "messages", special_tokens=special_tokens)

    async def _completion_tokens(
        self, prompts: list[str] | list[list[int]], echo: bool
    ) -> tuple[list[list[int]], tuple[str, ...]]:
        """The tokens of each prompt, and its text if it is echoed."""
        texts = [one for one in prompts if isinstance(one, str)]
        found = [one for one in prompts if not isinstance(one, str)]
        if texts:
            codec = self._need_codec("prompt")
            found = [await self._tokens_of(codec, text, "prompt") for text in texts]
        elif echo:
            codec = self._need_codec("echo")
            for tokens in found:
                self._check_tokens(tokens, "prompt")
            texts = [await _on(self._long_texts, partial(codec.tokens.echo_text, tokens)) for tokens in found]
        return found, tuple(texts) if echo else ()

    async def _tokens_of(self, codec: TextCodec, text: str, param: str, *, special_tokens: bool = True) -> list[int]:
        limit = self._engine.max_context_tokens
        threads = self._short_texts if len(text) <= SHORT_CHARACTERS else self._long_texts
        try:
            return await _on(threads, partial(codec.encode_within, text, limit, special_tokens=special_tokens))
        except TextTooLong as error:
            raise context_overflow(limit, f"your {param} resulted in at least {error.at_least} tokens", param) from None

    def _check_choices(self, prompts: int, options: Options) -> None:
        if prompts * options.n > self.settings.choices_max:
            given = f"{prompts} prompts with n {options.n}"
            raise bad_request(f"{given} ask for more than {self.settings.choices_max} answers", "n")
        if options.return_timing and prompts > 1:
            raise bad_request("return_timing needs a single prompt", "return_timing")

    def _need_codec(self, param: str) -> TextCodec:
        if self._codec is None:
            raise bad_request(
                f"{param} needs a tokenizer, and this checkpoint has none; give token ids to /v1/completions",
                param,
                "no_tokenizer",
            )
        return self._codec

    def _check_tokens(self, tokens: Sequence[int], param: str) -> bytes:
        """The tokens, packed. Raises ApiError."""
        if not tokens:
            raise bad_request(f"{param} is empty; allowed: at least one token", param)
        limit = self._engine.max_context_tokens
        if len(tokens) > limit:
            raise context_overflow(limit, f"your {param} resulted in {len(tokens)} tokens", param)
        packed = b""
        try:
            packed = pack_tokens(tokens)
            worst = highest_token(packed)
        except OverflowError:
            worst = min(tokens) if min(tokens) < 0 else max(tokens)
        if not 0 <= worst < self._engine.vocab_size:
            raise bad_request(f"{param} has token id {worst}; allowed: 0 to {self._engine.vocab_size - 1}", param)
        return packed

    def _room(self, tokens: int, options: Options, param: str) -> int:
        """How many tokens may be generated after a prompt of so many. Raises ApiError(400)."""
        limit = self._engine.max_context_tokens
        wanted = options.max_tokens if options.max_tokens is not None else max(limit - tokens, 1)
        if tokens + wanted > limit:
            parts = f"{tokens} in the {param}, {wanted} in the completion"
            raise context_overflow(limit, f"you requested {tokens + wanted} tokens ({parts})", param)
        if options.shaping is not None and options.shaping.min_tokens > wanted:
            raise wrong_value("min_tokens", options.shaping.min_tokens, f"at most the {wanted} tokens of the answer")
        return wanted


async def _on(threads: WorkThreads, work: Callable[[], T]) -> T:
    """Run `work` on these threads. Raises ApiError(429) when too much is queued."""
    try:
        return await threads.run(work)
    except TooMuchWork:
        message = f"{threads.open} requests wait to be read, and no more are taken"
        raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=1.0) from None
