"""Requests that are answered by another server's own API: a router whose engines have one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from penstock.engine.api import RequestReport
from penstock.server.preparation import RequestPreparation
from penstock.server.schema import GenerationBody


class Reply(Protocol):
    """An ASGI application that answers one request."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request."""


class OtherApi(Protocol):
    """Lives on the server's event loop."""

    def with_defaults(self, body: GenerationBody) -> None:
        """Set what the client left out, where the other server has defaults of its own."""

    async def prefill_of(self, request: Request) -> str | None:
        """See `GenerationRequest.prefill`. Raises ApiError."""

    def takes(self, raw: bytes, body: GenerationBody) -> bool:
        """Whether the other server answers this body."""

    async def reply(
        self,
        request: Request,
        raw: bytes,
        body: GenerationBody,
        tenant: str,
        answer_id: str,
        prefill: str | None,
        preparation: RequestPreparation,
        on_end: Callable[[str, RequestReport | None], None],
    ) -> Reply:
        """The answer to a body that `takes` takes; `prefill` is what `prefill_of` found. `on_end` is called once, with
        its outcome, and its report if there is one. Raises ApiError."""
