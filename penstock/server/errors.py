"""Errors as the OpenAI API shapes them: a status, and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from starlette.responses import Response

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An error answer. `param` names the faulty field; `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        challenge: str = "Bearer",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        self.challenge = challenge  # of a 401: how the client may authenticate

    def body(self) -> dict[str, Any]:
        """The answer's JSON object."""
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The answer, with the headers that its status requires."""
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["www-authenticate"] = self.challenge
        if self.status == 413:
            headers["connection"] = "close"
        return json_response(self.body(), self.status, headers)


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def context_overflow(limit: int, instead: str, param: str) -> ApiError:
    """A 400 in OpenAI's words, by which clients recognise it; `instead` follows "However, ". LiteLLM looks for the
    first sentence. LangChain looks for the code in the client exception's text, which is the message."""
    code = "context_length_exceeded"
    message = f"This model's maximum context length is {limit} tokens. However, {instead}. Please reduce the length"
    return ApiError(400, f"{message} of the {param} ({code}).", param=param, code=code)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, message, param=param, code=code)


NOT_HERE = 'docs/reference/http-api.md, "What is not here"'


def not_here(name: str, allowed: str, hint: str = "") -> ApiError:
    """A 400 for a field that is not implemented."""
    message = f"{name} is not supported by this server; allowed: {allowed}{hint} (see {NOT_HERE})"
    return bad_request(message, name, "unsupported_parameter")


def wrong_value(param: str, given: object, allowed: str) -> ApiError:
    """A 400 that names the field, the given value and the allowed values."""
    shown = repr(given)
    shown = shown if len(shown) <= 100 else shown[:100] + "..."
    return bad_request(f"{param} is {shown}; allowed: {allowed}", param)
