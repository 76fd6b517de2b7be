"""Request bodies: read within bounds of size, time and memory, and checked for nesting before they are parsed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from starlette.requests import Request

from penstock.server.errors import ApiError

# a refused body is read and dropped up to this size, so that the client can read the answer
DRAINED_BYTES_MAX = 256 * 2**20
FREE_BYTES = 2**16  # of each body, not counted in the budget: small requests are served whatever others send
_CHUNK_BYTES = 2**18
_OPEN_BRACE, _OPEN_BRACKET, _COMMA, _QUOTE = (ord(letter) for letter in '{[,"')


class BodyBudget:
    """Memory budget for the bodies of all requests that do not generate yet. Lives on the event loop."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.in_use = 0

    @contextmanager
    def open(self) -> Iterator[BodyLease]:
        """A lease for one request's body, released at the end of the block."""
        lease = BodyLease(self)
        try:
            yield lease
        finally:
            lease.release()


@dataclass(slots=True)
class BodyLease:
    """The part of the budget that one request's body takes."""

    budget: BodyBudget
    taken: int = 0

    def grow(self, size: int) -> None:
        """The body has `size` bytes now. Raises ApiError(429) when the budget is spent."""
        more = max(size - FREE_BYTES, 0) - self.taken
        if self.budget.in_use + more > self.budget.bytes_max:
            message = f"{self.budget.bytes_max} bytes of large requests are being read, and no more are taken"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=1.0)
        self.budget.in_use += more
        self.taken += more

    def release(self) -> None:
        """Release the lease; later calls do nothing."""
        self.budget.in_use -= self.taken
        self.taken = 0


async def read_body(request: Request, limit: int, too_large: ApiError, timeout_s: float, lease: BodyLease) -> bytes:
    """Read the whole body. Raises `too_large` beyond `limit` bytes (after the rest was read and dropped, up to
    DRAINED_BYTES_MAX), ApiError(408) after `timeout_s`, and ApiError(429) when the budget is spent."""
    declared = request.headers.get("content-length", "")
    announced = int(declared) if declared.isdigit() and len(declared) < 20 else 0
    refusal = too_large if announced > limit else None
    if refusal and (announced > DRAINED_BYTES_MAX or request.headers.get("expect", "").lower() == "100-continue"):
        raise refusal
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                size += len(part)
                if refusal is None and size > limit:
                    refusal = too_large
                if refusal is None:
                    try:
                        lease.grow(size)
                    except ApiError as error:
                        refusal = error
                if refusal is None:
                    parts.append(part)
                    continue
                parts.clear()
                lease.release()
                if size > DRAINED_BYTES_MAX:
                    raise refusal
    except TimeoutError:
        raise refusal or ApiError(408, f"the body did not arrive within {timeout_s:g} s") from None
    if refusal is not None:
        raise refusal
    return b"".join(parts)


def has_more_than(raw: bytes, containers_max: int, values_max: int) -> str | None:
    """Which limit a JSON text exceeds ("more than N objects and lists" or "values"), or None. Cheap compared with
    parsing, whatever the text is; other threads run meanwhile."""
    if len(raw) <= containers_max or _seems_small(raw, containers_max, values_max):
        return None
    containers = values = inside = 0
    backslash = b""
    for at in range(0, len(raw), _CHUNK_BYTES):
        piece = backslash + raw[at : at + _CHUNK_BYTES]
        whole = piece.rstrip(b"\\")
        backslash = b"\\" * ((len(piece) - len(whole)) % 2)  # an escape that the next chunk completes
        letters = np.frombuffer(whole.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
        outside = ((np.cumsum(letters == _QUOTE) + inside) & 1) == 0
        inside = (inside + int(np.count_nonzero(letters == _QUOTE))) & 1
        opens = (letters == _OPEN_BRACE) | (letters == _OPEN_BRACKET)
        containers += int(np.count_nonzero(opens & outside))
        values += int(np.count_nonzero((letters == _COMMA) & outside))
        if containers > containers_max:
            return f"more than {containers_max} objects and lists"
        if values + containers > values_max:
            return f"more than {values_max} values"
    return None


def _seems_small(raw: bytes, containers_max: int, values_max: int) -> bool:
    """Whether the text is within both limits even if every character inside strings counted."""
    containers = raw.count(b"{") + raw.count(b"[")
    return containers <= containers_max and containers + raw.count(b",") <= values_max
