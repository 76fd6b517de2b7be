"""Sends a generation to its client, streamed or whole, and watches for the client's disconnect."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive, Scope, Send

from penstock.server.errors import ApiError
from penstock.server.generation import ClientGone, Generation, SlowReader
from penstock.server.shapes import SSE_DONE, Answer, Shape, sse, timing_of, usage_of

ABORT_EXTENSION = "penstock.abort"  # scope extension: a function that closes the connection without flushing
ABORT_WAIT_S = 1.0

_JSON_HEADERS = [(b"content-type", b"application/json")]
_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@dataclass(frozen=True, slots=True)
class ReplyOptions:
    """How one request is answered: `n` choices, streamed or whole, with or without usage and timing. A client that
    reads nothing for `send_timeout_s` seconds is disconnected."""

    n: int
    stream: bool
    include_usage: bool
    return_timing: bool
    send_timeout_s: float
    hide_cached_tokens: bool


class GenerationReply:
    """An ASGI application that answers one request. The status line is sent with the first token, so failures before it
    get a proper status; later failures end the stream with an error event.

    `on_end(generation, outcome, arrival_s)` is called once, with "ok", "gone", "slow" or the error's status.
    """

    def __init__(
        self,
        generation: Generation,
        shape: Shape,
        options: ReplyOptions,
        on_end: Callable[[Generation, str, float], None],
        arrival_s: float,
    ) -> None:
        self._generation = generation
        self._shape = shape
        self._options = options
        self._on_end = on_end
        self._arrival_s = arrival_s
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request (ASGI). The generation has ended when this returns."""
        generation = self._generation
        watch = asyncio.create_task(self._watch(receive))
        outcome = "ok"
        try:
            generation.submit()
            await (self._stream(send) if self._options.stream else self._whole(send))
        except ApiError as error:
            outcome = str(error.status)
            with contextlib.suppress(SlowReader):
                await self._send_error(error, scope, receive, send)
        except ClientGone:
            outcome = "gone"
        except SlowReader:
            outcome = "slow"
            await self._abort(scope, watch)
        except asyncio.CancelledError:
            outcome = "503"
            raise
        except Exception:
            outcome = "500"
            raise
        finally:
            watch.cancel()
            generation.close()
            self._on_end(generation, outcome, self._arrival_s)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._generation.end("gone")

    async def _abort(self, scope: Scope, watch: asyncio.Task[None]) -> None:
        """Close the connection without flushing, if the server supports it, and wait until it is closed."""
        abort = scope.get("extensions", {}).get(ABORT_EXTENSION)
        if abort is not None:
            abort()
            await asyncio.wait([watch], timeout=ABORT_WAIT_S)

    async def _whole(self, send: Send) -> None:
        generation = self._generation
        answers = [Answer() for _ in generation.choices]
        async for pieces in generation.pieces():
            for piece in pieces:
                answers[piece.index].add(piece)
        await generation.reports()
        body = self._shape.whole(answers, self._usage(), self._timing())
        headers = [*_JSON_HEADERS, (b"content-length", b"%d" % len(body))]
        await self._start(send, headers)
        await self._send(send, body, more=False)

    async def _stream(self, send: Send) -> None:
        generation, options = self._generation, self._options
        async for pieces in generation.pieces():
            if not self._started:
                await self._start(send, _SSE_HEADERS)
            await self._send(send, b"".join(self._shape.chunk([piece]) for piece in pieces))
        tail = b""
        await generation.reports()
        if options.include_usage or options.return_timing:
            usage = self._usage() if options.include_usage else None
            tail = self._shape.last_chunk(usage, self._timing())
        await self._send(send, tail + SSE_DONE, more=False)

    def _usage(self) -> dict[str, Any]:
        options = self._options
        return usage_of(self._generation.choices, options.n, hide_cached_tokens=options.hide_cached_tokens)

    def _timing(self) -> dict[str, Any] | None:
        return timing_of(self._generation.choices[0].report) if self._options.return_timing else None

    async def _start(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self._started = True
        await self._bounded(send, {"type": "http.response.start", "status": 200, "headers": headers})

    async def _send(self, send: Send, body: bytes, more: bool = True) -> None:
        await self._bounded(send, {"type": "http.response.body", "body": body, "more_body": more})

    async def _bounded(self, send: Send, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._options.send_timeout_s):
                await send(message)
        except TimeoutError:
            raise SlowReader from None

    async def _send_error(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if self._started:
            await self._send(send, sse(error.body()), more=False)
        else:
            await error.response()(scope, receive, send)
