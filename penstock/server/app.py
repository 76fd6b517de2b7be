"""The OpenAI-compatible application: its routes, and the steps of a request before and after its generation."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from penstock.engine.api import EngineAPI, GenerationRequest, RequestReport
from penstock.server.errors import ApiError, bad_request, json_response
from penstock.server.gate import TENANT, Gate
from penstock.server.generation import Choice, Generation
from penstock.server.hosts import HostCheck
from penstock.server.live import LiveWindow, live_page, page_response
from penstock.server.logprobs import LogprobsShape
from penstock.server.metrics import CONTENT_TYPE, ServerMetrics
from penstock.server.other_api import OtherApi, Reply
from penstock.server.preparation import Prepared, RequestPreparation
from penstock.server.reply import GenerationReply, ReplyOptions
from penstock.server.schema import (
    NAME_CHARACTERS_MAX,
    ChatBody,
    CompletionBody,
    GenerationBody,
)
from penstock.server.settings import ServerSettings
from penstock.server.shapes import Shape
from penstock.server.text import TextCodec
from penstock.server.tokenize import DetokenizeBody, TokenizeBody, detokenize, tokenize
from penstock.server.tracing import TracedRequest, Tracing, otlp_tracing
from penstock.server.work_threads import TooMuchWork, WorkThreads

INFORMATION_WAITING_MAX = 64
A = TypeVar("A", TokenizeBody, DetokenizeBody)
B = TypeVar("B", bound=GenerationBody)
T = TypeVar("T")


class ServerApp:
    """The server's state and its endpoints; `asgi` is the application. Lives on one event loop."""

    def __init__(
        self,
        engine: EngineAPI,
        codec: TextCodec | None,
        settings: ServerSettings,
        more: Sequence[Route] = (),
        other: OtherApi | None = None,
    ) -> None:
        """`more`: further routes beside the API's. `other` answers the bodies that it takes."""
        self.settings = settings
        self.metrics = ServerMetrics(engine, settings.model_name)
        self.live = LiveWindow(settings.model_name)
        self.tracing: Tracing | None = None
        if settings.otlp_endpoint is not None:
            self.tracing = otlp_tracing(settings.otlp_endpoint, settings.model_name, self.metrics.traces_dropped.inc)
        self.render_metrics: Callable[[], bytes] = self.metrics.render  # the text of /metrics; it may block
        self.live_record: Callable[[], dict[str, Any]] = partial(self.live.record, engine)  # of /live; it may block
        self.draining = False
        self.hosts: HostCheck | None = None  # set by the listening server; None: any Host is accepted
        self.requests_max = settings.connections_max  # requests open at once, on all paths
        self._engine = engine
        self._codec = codec
        self._other = other
        self._created = int(time.time())
        self._generations: set[Generation] = set()
        self._preparing = 0
        self._others = 0  # answers of `other` that are open
        self._preparation = RequestPreparation(engine, codec, settings)
        self._information = WorkThreads("information", 2, INFORMATION_WAITING_MAX)
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
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {ApiError: _api_error, HTTPException: _http_error, Exception: _internal_error}
        routes += api if settings.api else []
        starlette = Starlette(routes=routes, exception_handlers=handlers)
        starlette.router.redirect_slashes = False  # redirects would send clients to the address in their `Host` header
        self.asgi: ASGIApp = Gate(starlette, self)
        if settings.cors_origins:
            self.asgi = CORSMiddleware(
                self.asgi,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )

    @property
    def body_bytes_in_use(self) -> int:
        """Bytes of large request bodies that are held before their generation starts."""
        return self._preparation.bodies.in_use

    def cancel_all(self) -> None:
        """End every running generation with a 503."""
        for generation in list(self._generations):
            generation.end("shutdown")

    def close(self) -> None:
        """Stop the server's threads; call it after the last request."""
        self._preparation.close()
        self._information.stop()
        if self.tracing is not None:
            self.tracing.close()

    # -- endpoints ----------------------------------------------------------------------------------------------

    async def _completions(self, request: Request) -> Reply | Response:
        return await self._generate(request, CompletionBody)

    async def _chat(self, request: Request) -> Reply | Response:
        return await self._generate(request, ChatBody)

    async def _tokenize(self, request: Request) -> Response:
        return await self._answer_about_text(request, TokenizeBody, tokenize)

    async def _detokenize(self, request: Request) -> Response:
        return await self._answer_about_text(request, DetokenizeBody, detokenize)

    async def _answer_about_text(
        self, request: Request, kind: type[A], answer: Callable[[RequestPreparation, A], Awaitable[dict[str, Any]]]
    ) -> Response:
        try:
            with self._preparation.bodies.open() as lease:
                body = await self._preparation.read(request, kind, lease)
                self._check_model(body.model)
                return json_response(await answer(self._preparation, body))
        except ClientDisconnect:
            return Response(status_code=408)  # the client is gone: nobody reads this answer

    async def _page(self, request: Request) -> Response:
        return page_response(live_page("penstock.server", "page.html"))

    async def _live(self, request: Request) -> Response:
        return json_response(await self._inform(self.live_record))

    async def _metrics(self, request: Request) -> Response:
        return Response(await self._inform(self.render_metrics), headers={"content-type": CONTENT_TYPE})

    async def _inform(self, ask: Callable[[], T]) -> T:
        """Run a query of the engine that may block, on a thread. Raises ApiError(503) when too many are waiting."""
        try:
            return await self._information.run(ask)
        except TooMuchWork:
            raise ApiError(503, "too many ask for this at once", retry_after_s=1.0) from None

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

    async def _generate(self, request: Request, kind: type[B]) -> Reply | Response:
        arrival_s, limit = time.monotonic(), self.settings.open_requests_max
        if self._preparing + len(self._generations) + self._others >= limit:
            message = f"{limit} requests are open, and no more are taken"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=1.0)
        if not self._engine.vocab_size:  # a router without engines
            raise ApiError(503, self._engine.healthy()[1], code="no_engine", retry_after_s=1.0)
        self._preparing += 1
        try:
            with self._preparation.bodies.open() as lease:
                raw = await self._preparation.read_raw(request, kind, lease)
                body = await self._preparation.parse(raw, kind)
                self._check_model(body.model)
                prefill = None
                if self._other is not None:
                    prefill = await self._other.prefill_of(request)
                    self._other.with_defaults(body)
                    if self._other.takes(raw, body):
                        return await self._other_reply(self._other, request, raw, body, prefill)
                prepared = await self._preparation.prepare(request, body, request.scope.get(TENANT, ""))
            answer = self._answer_id(request, prepared)
            traced = TracedRequest.of(request.headers, answer[0], chat=prepared.chat)
            return self._reply(prepared, arrival_s, answer, traced, prefill)
        except ClientDisconnect:
            return Response(status_code=408)  # the client is gone: nobody reads this answer
        finally:
            self._preparing -= 1

    async def _other_reply(
        self, other: OtherApi, request: Request, raw: bytes, body: GenerationBody, prefill: str | None
    ) -> Reply:
        arrival_s = time.monotonic()

        def ended(outcome: str, report: RequestReport | None) -> None:
            self._others -= 1
            self.metrics.finished.labels(outcome).inc()
            if report is not None:
                self.metrics.e2e.observe(time.monotonic() - arrival_s)
                self.metrics.observe(report)
                self.live.add(report)
                if report.ttft_s is not None:
                    self.metrics.ttft.observe(report.ttft_s)

        answer_id = f"other-{uuid.uuid4().hex}"
        tenant = request.scope.get(TENANT, "")
        reply = await other.reply(request, raw, body, tenant, answer_id, prefill, self._preparation, ended)
        self._others += 1
        return reply

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.settings.model_name and name not in self.settings.model_aliases:
            message = f"model {name[:200]!r} does not exist; this server has {self.settings.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _answer_id(self, request: Request, prepared: Prepared) -> tuple[str, str]:
        """The answer's unique id, and the label under which the client may ask for the same answer again (empty: it may
        not)."""
        kind = "chatcmpl" if prepared.chat else "cmpl"
        answer_id = f"{kind}-{uuid.uuid4().hex}"
        given = request.headers.get("x-request-id") if self.settings.resumable else None
        if not given:
            return answer_id, ""
        if len(given) > NAME_CHARACTERS_MAX:
            raise bad_request(f"x-request-id has {len(given)} characters; {NAME_CHARACTERS_MAX} are allowed")
        tenant = prepared.options.tenant
        named = hashlib.sha256("\0".join((kind, tenant, given)).encode(errors="surrogatepass"))
        return answer_id, named.hexdigest()[:32]

    def _reply(
        self,
        prepared: Prepared,
        arrival_s: float,
        answer: tuple[str, str],
        traced: TracedRequest,
        prefill: str | None,
    ) -> GenerationReply:
        options, settings = prepared.options, self.settings
        answer_id, label = answer
        choices: list[Choice] = []
        for tokens, packed, max_tokens in zip(prepared.prompts, prepared.packed, prepared.max_tokens, strict=True):
            for choice in range(options.n):
                request = GenerationRequest(
                    f"{answer_id}-{len(choices)}",
                    tokens,
                    options.sampling(choice, max_tokens),
                    options.slo_ttft_s,
                    options.tenant,
                    options.session,
                    resume_label=f"{label}-{len(choices)}" if label else "",
                    packed=packed,
                    prefill=prefill,
                )
                choices.append(
                    Choice(
                        len(choices),
                        request,
                        self._codec,
                        options.stop,
                        chat=prepared.chat,
                        echo_tokens=prepared.echo_tokens,
                    )
                )
        generation = Generation(
            self._engine,
            choices,
            timeout_s=settings.request_timeout_s,
            cancel_timeout_s=settings.cancel_timeout_s,
            queue_tokens_max=settings.queue_tokens_max,
        )
        pieces = self._codec.pieces if self._codec is not None else None
        shape = Shape(
            answer_id,
            int(time.time()),
            settings.model_name,
            chat=prepared.chat,
            token_ids=options.return_token_ids or self._codec is None,
            include_usage=options.stream and options.include_usage,
            prefixes=tuple(text for text in prepared.prefixes for _ in range(options.n)),
            logprobs=None if options.logprobs is None else LogprobsShape(pieces, chat=prepared.chat),
        )
        how = ReplyOptions(
            options.n,
            options.stream,
            options.include_usage,
            options.return_timing,
            settings.send_timeout_s,
            settings.hide_cached_tokens,
        )
        self._generations.add(generation)
        return GenerationReply(generation, shape, how, partial(self._ended, traced), arrival_s)

    def _ended(self, traced: TracedRequest, generation: Generation, outcome: str, arrival_s: float) -> None:
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
        if self.tracing is not None:
            self.tracing.ended(traced, generation, outcome, arrival_s)


async def _api_error(request: Request, error: ApiError) -> Response:
    return error.response()


async def _http_error(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    response = ApiError(error.status_code, message).response()
    response.headers.update(error.headers or {})
    return response


async def _internal_error(request: Request, error: Exception) -> Response:
    return ApiError(500, f"internal error: {type(error).__name__}", code="internal_error").response()
