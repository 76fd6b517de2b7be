"""What every request passes, in and out: the key, counts by status, headers, and a bound on unread answers."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import uuid
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.server.errors import ApiError
from penstock.server.reply import ABORT_EXTENSION

if TYPE_CHECKING:
    from penstock.server.app import ServerApp

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
    "/tokenize",
    "/detokenize",
}
REQUEST_ID_BYTES_MAX = 512
UNREAD_MARGIN_S = 5.0  # answers that have a bound of their own on unread data end before this one does


def is_api(path: str) -> bool:
    """Whether this path is for everybody who has a key."""
    return path.startswith("/v1/") or path in ("/tokenize", "/detokenize")


class Gate:
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

        send_timeout_s = self._server.settings.send_timeout_s + UNREAD_MARGIN_S
        more_headers = self._more_headers(scope)

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *more_headers]
            try:
                async with asyncio.timeout(send_timeout_s):
                    await send(message)
            except TimeoutError:  # the client reads nothing
                abort = scope.get("extensions", {}).get(ABORT_EXTENSION)
                if abort is None:
                    raise
                abort()

        metrics.open_requests.inc()
        try:
            await (self._refusal(scope) or self._inner)(scope, receive, counted)
        finally:
            metrics.open_requests.dec()
            path = scope["path"] if scope["path"] in _PATHS else "other"
            metrics.http_requests.labels(path, str(status or "none")).inc()

    def _more_headers(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """The request's id, the client's own where it gave one; and how long the connection is kept, where it is."""
        given = dict(scope["headers"])
        label = given.get(b"x-request-id", b"")
        if not 0 < len(label) <= REQUEST_ID_BYTES_MAX or not all(0x20 < byte < 0x7F for byte in label):
            label = b"req-" + uuid.uuid4().hex.encode()
        headers = [(b"x-request-id", label)]
        if scope.get("http_version") == "1.1" and b"close" not in given.get(b"connection", b"").lower():
            headers.append((b"keep-alive", b"timeout=%d" % max(1, int(self._server.settings.keep_alive_s))))
        return headers

    def _refusal(self, scope: Scope) -> Response | None:
        if not is_api(scope["path"]):
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
