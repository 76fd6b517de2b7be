"""Checks around every request: host, key and content type, counts by status, headers, and a bound on unread answers."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.server.api_keys import KeyCheck
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
_WITHOUT_KEY = ("/health", "/penstock/routers")  # the second one checks the cluster's own proof
REQUEST_ID_BYTES_MAX = 512
TENANT = "penstock.tenant"
_CHALLENGE = 'Basic realm="penstock", charset="UTF-8"'
_OF_CURL = (b"application/x-www-form-urlencoded", b"")
_NO_SNIFFING = (b"x-content-type-options", b"nosniff")
UNREAD_MARGIN_S = 5.0  # answers with their own bound on unread data end before this one does


def is_api(path: str) -> bool:
    """Whether any valid key gives access to this path."""
    return path.startswith("/v1/") or path in ("/tokenize", "/detokenize")


class Gate:
    """ASGI middleware around all routes: access, counts by status, and no new work while shutting down.

    A request's tenant, if its key names one, is in the scope under TENANT; clients cannot set it.
    """

    def __init__(self, inner: ASGIApp, server: ServerApp) -> None:
        self._inner = inner
        self._server = server
        self._keys = KeyCheck(server.settings.api_key, server.settings.tenant_keys)
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve or refuse one request (ASGI)."""
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
            except TimeoutError:  # the client does not read
                abort = scope.get("extensions", {}).get(ABORT_EXTENSION)
                if abort is None:
                    raise
                abort()

        metrics.open_requests.inc()
        self._open += 1
        try:
            await (self._refusal(scope) or self._inner)(scope, receive, counted)
        finally:
            self._open -= 1
            metrics.open_requests.dec()
            path = scope["path"] if scope["path"] in _PATHS else "other"
            metrics.http_requests.labels(path, str(status or "none")).inc()

    def _more_headers(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """Headers added to every answer: the request's id (the client's own if it sent one), and the keep-alive
        time."""
        given = dict(scope["headers"])
        label = given.get(b"x-request-id", b"")
        if not 0 < len(label) <= REQUEST_ID_BYTES_MAX or not all(0x20 < byte < 0x7F for byte in label):
            label = b"req-" + uuid.uuid4().hex.encode()
        headers = [(b"x-request-id", label), _NO_SNIFFING]
        if scope.get("http_version") == "1.1" and b"close" not in given.get(b"connection", b"").lower():
            headers.append((b"keep-alive", b"timeout=%d" % max(1, int(self._server.settings.keep_alive_s))))
        return headers

    def _refusal(self, scope: Scope) -> Response | None:
        """The error for a wrong host, a missing key or a wrong content type; None to go on."""
        hosts = self._server.hosts
        if hosts is not None and not hosts.allows(scope["headers"], scope.get("http_version", "1.1")):
            text = "this server is not known by the name in Host (--allowed-host adds names)"
            return ApiError(403, text, code="host_not_allowed").response()
        if self._open > self._server.requests_max:
            text = f"{self._server.requests_max} requests are being answered; the open files allow no more"
            return ApiError(503, text, code="overloaded", retry_after_s=1.0).response()
        path = scope["path"]
        if path in _WITHOUT_KEY:
            return None
        refusal = self._key_refusal(scope, path)
        if refusal is None and is_api(path):
            refusal = self._api_refusal(scope)
        return None if refusal is None else refusal.response()

    def _key_refusal(self, scope: Scope, path: str) -> ApiError | None:
        """Access by key: the API needs any valid key, everything else the operator's."""
        settings, keys = self._server.settings, self._keys
        if path == "/metrics" and settings.open_metrics:
            return None
        api = is_api(path)
        if not keys.needed:
            if settings.hide_cached_tokens and not api:
                return ApiError(403, "what is cached is hidden: this needs a key, and there is none (--api-key-file)")
            return None
        caller = keys.caller(scope["headers"], basic=not api)
        if caller is None:
            if api:
                return ApiError(401, "the API key is missing or wrong (Authorization: Bearer KEY)")
            text = "the operator's key is missing or wrong (Authorization: Bearer KEY, or as a password)"
            return ApiError(401, text, challenge=_CHALLENGE)
        if not api and not caller.operator:
            return ApiError(403, "this needs the operator's key (--api-key-file), not that of a tenant")
        scope[TENANT] = caller.tenant
        return None

    def _api_refusal(self, scope: Scope) -> ApiError | None:
        if self._server.draining:
            return ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=5.0)
        if scope["method"] != "POST":
            return None
        headers = dict(scope["headers"])
        given = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if given != b"application/json":
            text = f"Content-Type is {given.decode('latin-1')[:100] or 'missing'}; allowed: application/json"
            hint = " (curl: -H 'Content-Type: application/json', or --json)" if given in _OF_CURL else ""
            return ApiError(415, text + hint, code="unsupported_media_type")
        encoding = headers.get(b"content-encoding", b"identity").strip().lower()
        if encoding not in (b"", b"identity"):
            text = f"Content-Encoding is {encoding.decode('latin-1')[:100]}; allowed: none"
            return ApiError(415, text, code="unsupported_media_type")
        return None
