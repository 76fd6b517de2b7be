"""The OpenAI-compatible application: routes, and what happens to a request before and after its generation."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.engine.api import EngineAPI, GenerationRequest
from penstock.server.errors import ApiError, bad_request, json_response
from penstock.server.generation import Choice, Generation
from penstock.server.live import LiveWindow, live_page
from penstock.server.metrics import CONTENT_TYPE, ServerMetrics
from penstock.server.reply import GenerationReply, ReplyOptions
from penstock.server.schema import (
    NAME_CHARACTERS_MAX,
    ChatBody,
    CompletionBody,
    GenerationBody,
    Options,
    chat_messages,
    check_options,
    decode_body,
    prompts_of,
)
from penstock.server.settings import ServerSettings
from penstock.server.shapes import Shape
from penstock.server.text import TextCodec

COMPLETION_MAX_TOKENS = 16  # the OpenAI API's default for completions; chats get what the context has room for
_PATHS = {
    "/",
    "/live",
    "/ui",
    "/ui/data",
    "/health",
    "/metrics",
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
}
B = TypeVar("B", bound=GenerationBody)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A checked request, ready to submit."""

    options: Options
    prompts: list[list[int]]
    max_tokens: list[int]
    prefixes: tuple[str, ...]
    chat: bool


class ServerApp:
    """The server's state and its endpoints; `asgi` is the application. Lives on one event loop."""

    def __init__(
        self, engine: EngineAPI, codec: TextCodec | None, settings: ServerSettings, more: Sequence[Route] = ()
    ) -> None:
        """`more`: routes beside the API."""
        self.settings = settings
        self.metrics = ServerMetrics(engine)
        self.live = LiveWindow(settings.model_name)
        self.draining = False
        self._engine = engine
        self._codec = codec
        self._created = int(time.time())
        self._generations: set[Generation] = set()
        self._preparing = 0
        routes = [
            Route("/", self._page),
            Route("/live", self._live),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            *more,
        ]
        api = [
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {ApiError: _api_error, HTTPException: _http_error, Exception: _internal_error}
        routes += api if settings.api else []
        self.asgi: ASGIApp = _Gate(Starlette(routes=routes, exception_handlers=handlers), self)

    def cancel_all(self) -> None:
        """End every generation under way with a 503."""
        for generation in list(self._generations):
            generation.end("shutdown")

    # -- endpoints ----------------------------------------------------------------------------------------------

    async def _completions(self, request: Request) -> GenerationReply | Response:
        return await self._generate(request, CompletionBody)

    async def _chat(self, request: Request) -> GenerationReply | Response:
        return await self._generate(request, ChatBody)

    async def _page(self, request: Request) -> Response:
        return Response(live_page("penstock.server", "page.html"), media_type="text/html")

    async def _live(self, request: Request) -> Response:
        return json_response(await asyncio.to_thread(self.live.record, self._engine))

    async def _metrics(self, request: Request) -> Response:
        return Response(await asyncio.to_thread(self.metrics.render), headers={"content-type": CONTENT_TYPE})

    async def _health(self, request: Request) -> Response:
        healthy, why = self._engine.healthy()
        if self.draining:
            healthy, why = False, "shutting down"
        body = {"status": "ok"} if healthy else {"status": "unhealthy", "reason": why}
        return json_response(body, 200 if healthy else 503)

    async def _models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._model_record()]})

    async def _model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return json_response(self._model_record())

    def _model_record(self) -> dict[str, Any]:
        return {
            "id": self.settings.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "penstock",
            "max_model_len": self._engine.max_context_tokens,
        }

    # -- one generation -----------------------------------------------------------------------------------------

    async def _generate(self, request: Request, kind: type[B]) -> GenerationReply | Response:
        arrival_s, limit = time.monotonic(), self.settings.open_requests_max
        if self._preparing + len(self._generations) >= limit:
            message = f"{limit} requests are open, and no more are taken"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=1.0)
        if not self._engine.vocab_size:  # a router without engines
            raise ApiError(503, self._engine.healthy()[1], code="no_engine", retry_after_s=1.0)
        self._preparing += 1
        try:
            raw = await self._body(request)
            body = decode_body(raw, kind)
            self._check_model(body.model)
            prepared = await self._prepare(request, body)
            return self._reply(prepared, arrival_s, self._answer_id(request, prepared))
        except ClientDisconnect:
            return Response(status_code=408)  # nobody reads it
        finally:
            self._preparing -= 1

    async def _body(self, request: Request) -> bytes:
        """The request's body, bounded in size and time."""
        limit = self.settings.body_bytes_max
        too_large = ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.settings.body_timeout_s):
                async for part in request.stream():
                    size += len(part)
                    if size > limit:
                        raise too_large
                    parts.append(part)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {self.settings.body_timeout_s:g} s") from None
        return b"".join(parts)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.settings.model_name:
            message = f"model {name[:200]!r} does not exist; this server has {self.settings.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def _prepare(self, request: Request, body: GenerationBody) -> _Prepared:
        default = COMPLETION_MAX_TOKENS if isinstance(body, CompletionBody) else None
        options = check_options(body, request.headers, default, self.settings)
        codec = self._codec
        prefixes: tuple[str, ...] = ()
        if isinstance(body, ChatBody):
            codec = self._need_codec("messages")
            variables = dict(body.chat_template_kwargs or {})
            if body.reasoning_effort is not None:
                variables["reasoning_effort"] = body.reasoning_effort
            prompts = [await asyncio.to_thread(codec.encode_chat, chat_messages(body), variables)]
        else:
            assert isinstance(body, CompletionBody)
            prompts, prefixes = await self._encode(body)
        if options.stop and codec is None:
            raise bad_request("stop needs a tokenizer, and this checkpoint has none", "stop")
        if len(prompts) * options.n > self.settings.choices_max:
            given = f"{len(prompts)} prompts with n {options.n}"
            raise bad_request(f"{given} ask for more than {self.settings.choices_max} answers", "n")
        if options.return_timing and len(prompts) > 1:
            raise bad_request("return_timing needs a single prompt", "return_timing")
        room = [self._room(tokens, options, index) for index, tokens in enumerate(prompts)]
        return _Prepared(options, prompts, room, prefixes, isinstance(body, ChatBody))

    async def _encode(self, body: CompletionBody) -> tuple[list[list[int]], tuple[str, ...]]:
        """Tokens of each prompt, and its text where it is to be echoed."""
        prompts = prompts_of(body)
        texts = [one for one in prompts if isinstance(one, str)]
        found = [one for one in prompts if not isinstance(one, str)]
        if texts:
            codec = self._need_codec("prompt")
            found = await asyncio.to_thread(lambda: [codec.encode(text) for text in texts])
        elif body.echo:
            codec = self._need_codec("echo")
            for tokens in found:
                self._check_tokens(tokens)
            texts = await asyncio.to_thread(lambda: [codec.decode(tokens) for tokens in found])
        return found, tuple(texts) if body.echo else ()

    def _need_codec(self, param: str) -> TextCodec:
        if self._codec is None:
            raise bad_request(
                f"{param} needs a tokenizer, and this checkpoint has none; give token ids to /v1/completions",
                param,
                "no_tokenizer",
            )
        return self._codec

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise bad_request("prompt is empty; allowed: at least one token", "prompt")
        if min(tokens) < 0 or max(tokens) >= self._engine.vocab_size:
            worst = min(tokens) if min(tokens) < 0 else max(tokens)
            raise bad_request(f"prompt has token id {worst}; allowed: 0 to {self._engine.vocab_size - 1}", "prompt")

    def _room(self, tokens: Sequence[int], options: Options, index: int) -> int:
        """Tokens that may be generated after this prompt. Raises ApiError(400)."""
        self._check_tokens(tokens)
        limit = self._engine.max_context_tokens
        wanted = options.max_tokens if options.max_tokens is not None else max(limit - len(tokens), 1)
        if len(tokens) + wanted > limit:
            raise bad_request(
                f"prompt {index} has {len(tokens)} tokens and up to {wanted} are to be generated; "
                f"allowed: {limit} together (the model's context)",
                "prompt",
                "context_length_exceeded",
            )
        return wanted

    def _answer_id(self, request: Request, prepared: _Prepared) -> tuple[str, bool]:
        """The answer's id, and whether a client may ask for it again: it follows from what the client calls it then."""
        kind = "chatcmpl" if prepared.chat else "cmpl"
        given = request.headers.get("x-request-id") if self.settings.resumable else None
        if not given:
            return f"{kind}-{uuid.uuid4().hex}", False
        if len(given) > NAME_CHARACTERS_MAX:
            raise bad_request(f"x-request-id has {len(given)} characters; {NAME_CHARACTERS_MAX} are allowed")
        tenant = prepared.options.tenant
        named = hashlib.sha256("\0".join((kind, tenant, given)).encode(errors="surrogatepass"))
        return f"{kind}-{named.hexdigest()[:32]}", True

    def _reply(self, prepared: _Prepared, arrival_s: float, answer: tuple[str, bool]) -> GenerationReply:
        options, settings = prepared.options, self.settings
        answer_id, resumable = answer
        choices: list[Choice] = []
        for tokens, max_tokens in zip(prepared.prompts, prepared.max_tokens, strict=True):
            for choice in range(options.n):
                request = GenerationRequest(
                    f"{answer_id}-{len(choices)}",
                    tokens,
                    options.sampling(choice, max_tokens),
                    options.slo_ttft_s,
                    options.tenant,
                    options.session,
                    resumable=resumable,
                )
                choices.append(Choice(len(choices), request, self._codec, options.stop))
        generation = Generation(
            self._engine,
            choices,
            timeout_s=settings.request_timeout_s,
            cancel_timeout_s=settings.cancel_timeout_s,
            queue_tokens_max=settings.queue_tokens_max,
        )
        shape = Shape(
            answer_id,
            int(time.time()),
            settings.model_name,
            chat=prepared.chat,
            token_ids=options.return_token_ids or self._codec is None,
            include_usage=options.stream and options.include_usage,
            prefixes=tuple(text for text in prepared.prefixes for _ in range(options.n)),
        )
        how = ReplyOptions(
            options.n, options.stream, options.include_usage, options.return_timing, settings.send_timeout_s
        )
        self._generations.add(generation)
        return GenerationReply(generation, shape, how, self._ended, arrival_s)

    def _ended(self, generation: Generation, outcome: str, arrival_s: float) -> None:
        self._generations.discard(generation)
        self.metrics.finished.labels(outcome).inc()
        if outcome == "ok":
            self.metrics.e2e.observe(time.monotonic() - arrival_s)
        for choice in generation.choices:
            if choice.first_token_s is not None and choice.last_token_s is not None:
                self.metrics.ttft.observe(choice.first_token_s - arrival_s)
                if choice.tokens > 1:
                    self.metrics.tpot.observe((choice.last_token_s - choice.first_token_s) / (choice.tokens - 1))
            if choice.report is not None:
                self.metrics.observe(choice.report)
                self.live.add(choice.report)


class _Gate:
    """Around everything: the API key, counts of requests by status, and no new work while shutting down."""

    def __init__(self, inner: ASGIApp, server: ServerApp) -> None:
        self._inner = inner
        self._server = server
        key = server.settings.api_key
        self._key_digest = None if key is None else hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        metrics = self._server.metrics
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        metrics.open_requests.inc()
        try:
            await (self._refusal(scope) or self._inner)(scope, receive, counted)
        finally:
            metrics.open_requests.dec()
            path = scope["path"] if scope["path"] in _PATHS else "other"
            metrics.http_requests.labels(path, str(status or "none")).inc()

    def _refusal(self, scope: Scope) -> Response | None:
        if not scope["path"].startswith("/v1/"):
            return None
        if self._key_digest is not None and not self._authorised(scope):
            return ApiError(401, "the API key is missing or wrong (Authorization: Bearer KEY)").response()
        if self._server.draining:
            return ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=5.0).response()
        return None

    def _authorised(self, scope: Scope) -> bool:
        assert self._key_digest is not None
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        same = hmac.compare_digest(hashlib.sha256(key.strip()).digest(), self._key_digest)
        return same and bool(scheme.lower() == b"bearer")


async def _api_error(request: Request, error: ApiError) -> Response:
    return error.response()


async def _http_error(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    response = ApiError(error.status_code, message).response()
    response.headers.update(error.headers or {})
    return response


async def _internal_error(request: Request, error: Exception) -> Response:
    return ApiError(500, f"internal error: {type(error).__name__}", code="internal_error").response()
