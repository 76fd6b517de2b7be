"""Bodies that vLLM answers itself: with fields that the router's own API does not have, or whose answers vLLM parses.

The router places such a request as any other; the decode engine's agent gives the body to its vLLM and passes the
answer back, byte for byte. The router's tokens of the prompt only decide what the prefill engine computes: where vLLM
makes other tokens of it, its engine finds other blocks, and computes what it misses.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from penstock.cluster.messages import API_BODY_BYTES_MAX
from penstock.cluster.router.named_prefill import NamedPrefill
from penstock.cluster.router.router import RequestRouter
from penstock.engine.api import ApiCall, GenerationRequest, InvalidRequest, Overloaded, RequestReport, TokenEvent
from penstock.engine.runner import SamplingParams
from penstock.server.errors import ApiError, bad_request
from penstock.server.generation import Inbox, failure
from penstock.server.preparation import RequestPreparation
from penstock.server.schema import (
    ChatBody,
    CompletionBody,
    GenerationBody,
    neutral,
    tenant_of_body,
    unknown_fields,
    wants_more,
)
from penstock.server.settings import ServerSettings

OnEnd = Callable[[str, RequestReport | None], None]


class VllmApi:
    """Lives on the server's event loop."""

    def __init__(
        self, engine: RequestRouter, settings: ServerSettings, named_prefill: NamedPrefill | None = None
    ) -> None:
        """With `named_prefill` requests name the engine that computes their prompts."""
        self._engine = engine
        self._settings = settings
        self._named_prefill = named_prefill

    def with_defaults(self, body: GenerationBody) -> None:
        """Set what the client left out to the defaults of the model, as vLLM does."""
        for name, value in self._engine.sampling_defaults.items():
            if getattr(body, name, 0) is None:
                setattr(body, name, int(value) if name == "top_k" else value)

    async def prefill_of(self, request: Request) -> str | None:
        """See `OtherApi`."""
        return await self._named_prefill.of(request.headers) if self._named_prefill is not None else None

    def takes(self, raw: bytes, body: GenerationBody) -> bool:
        """Whether vLLM answers this body."""
        if self._engine.kind != "vllm":
            return False
        chat = isinstance(body, ChatBody)
        return wants_more(body) or (chat and self._engine.parses_chats) or bool(unknown_fields(raw, type(body)))

    async def reply(
        self,
        request: Request,
        raw: bytes,
        body: GenerationBody,
        tenant: str,
        answer_id: str,
        prefill: str | None,
        preparation: RequestPreparation,
        on_end: OnEnd,
    ) -> VllmReply:
        """The answer to a body that `takes` takes. Raises ApiError."""
        if len(raw) > API_BODY_BYTES_MAX:
            raise ApiError(413, f"the body is larger than {API_BODY_BYTES_MAX} bytes", code="body_too_large")
        if isinstance(body, CompletionBody) and _several(body.prompt):
            raise bad_request(
                "prompt has several prompts together with fields that vLLM answers; allowed: one", "prompt"
            )
        tools = getattr(body, "tools", None)
        plain = neutral(body)
        tools = tools if isinstance(tools, Sequence) and not isinstance(tools, str) else None
        try:
            prepared = await preparation.prepare(request, plain, tenant, tools)
            options, tokens, most = prepared.options, prepared.prompts[0], prepared.max_tokens[0]
        except ApiError as error:
            if error.status != 400:
                raise
            options, tokens, most = None, [0], 1  # vLLM says what is wrong with it, or knows better
            tenant = tenant_of_body(body, tenant, self._settings)
        path = "/v1/chat/completions" if isinstance(body, ChatBody) else "/v1/completions"
        made = GenerationRequest(
            f"{answer_id}-0",
            tokens,
            SamplingParams(most, 0.0),
            options.slo_ttft_s if options is not None else None,
            options.tenant if options is not None else tenant,
            options.session if options is not None else None,
            api=ApiCall(path, raw),
            packed=prepared.packed[0],
            prefill=prefill,
        )
        return VllmReply(self._engine, made, self._settings, on_end)


def _several(prompt: str | list[Any]) -> bool:
    return isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)


class VllmReply:
    """An ASGI application that passes on one answer of vLLM. `on_end` is called once, as `GenerationReply`'s."""

    def __init__(
        self, engine: RequestRouter, request: GenerationRequest, settings: ServerSettings, on_end: OnEnd
    ) -> None:
        self._engine = engine
        self._request = request
        self._settings = settings
        self._on_end = on_end
        self._gone = False
        self._slow = False
        self._inbox: Inbox | None = None
        self._report: RequestReport | None = None
        self._stream = False  # the answer is one of events, which can end with an error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request (ASGI). It has ended in the engine, or is cancelled, when this returns."""
        inbox = self._inbox = Inbox(self._settings.queue_tokens_max, self._overflowed)
        watch = asyncio.create_task(self._watch(receive))
        outcome, started = "ok", False
        try:
            self._submit(inbox)
            async for data in self._pieces(inbox):
                if not started:
                    head, _, data = data.partition(b"\n")
                    started = True
                    await self._start(send, head)
                await self._send(send, data)
            await self._send(send, b"", more=False)
        except ApiError as error:
            outcome = str(error.status)
            if not started:
                await error.response()(scope, receive, send)
            elif self._stream:
                await self._send(send, b"data: " + msgspec.json.encode(error.body()) + b"\n\n", more=False)
            else:
                raise  # the server closes the connection: half a JSON text must not look whole
        except (ConnectionError, TimeoutError):
            outcome = "gone" if self._gone else "slow"
        finally:
            watch.cancel()
            self._engine.cancel(self._request.request_id)
            self._on_end(outcome, self._report)

    def _submit(self, inbox: Inbox) -> None:
        try:
            self._engine.submit(self._request, partial(inbox.put, 0))
        except InvalidRequest as error:
            raise bad_request(str(error)) from None
        except Overloaded as error:
            raise ApiError(429, str(error), code="rate_limit_exceeded", retry_after_s=error.retry_after_s) from None

    async def _pieces(self, inbox: Inbox) -> Any:
        """What vLLM sends. Raises ApiError where it fails, ConnectionError where the client is gone."""
        end_s = time.monotonic() + self._settings.request_timeout_s
        while True:
            try:
                events = await inbox.take(end_s - time.monotonic())
            except TimeoutError:
                raise failure("timeout", "the request did not finish in time") from None
            if self._gone:
                raise ConnectionError
            if self._slow:
                raise TimeoutError
            event: TokenEvent
            for _, event in events:
                if event.data:
                    yield event.data
                if event.finish_reason is not None:
                    self._report = event.report
                    if event.finish_reason not in ("stop", "length"):
                        raise failure(event.finish_reason, event.error)
                    return

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        if self._inbox is not None:
            self._inbox.wake()

    def _overflowed(self) -> None:
        self._slow = True
        if self._inbox is not None:
            self._inbox.wake()

    async def _start(self, send: Send, head: bytes) -> None:
        said = json.loads(head)
        kind = str(said["content_type"])
        self._stream = kind.startswith("text/event-stream")
        headers = [(b"content-type", kind.encode("latin-1", "replace"))]
        headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")] if self._stream else []
        await self._bounded(send, {"type": "http.response.start", "status": int(said["status"]), "headers": headers})

    async def _send(self, send: Send, body: bytes, more: bool = True) -> None:
        await self._bounded(send, {"type": "http.response.body", "body": body, "more_body": more})

    async def _bounded(self, send: Send, message: dict[str, Any]) -> None:
        async with asyncio.timeout(self._settings.send_timeout_s):
            await send(message)
