"""The engine requests behind one HTTP request: submits them and turns their tokens into text for one coroutine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from penstock.core.operations import FinishReason
from penstock.engine.api import (
    EngineAPI,
    GenerationRequest,
    InvalidRequest,
    Overloaded,
    RequestReport,
    TokenEvent,
    Unsupported,
)
from penstock.engine.shaping import TokenLogprobs
from penstock.server.detokenize import StopFinder, TokenDecoder
from penstock.server.errors import NOT_HERE, ApiError, bad_request, context_overflow
from penstock.server.harmony import ChannelSplitter, Destination
from penstock.server.text import TextCodec

log = logging.getLogger(__name__)

EndReason = Literal["gone", "slow", "shutdown"]


class ClientGone(Exception):
    """The client closed the connection."""


class SlowReader(Exception):
    """The client did not read the answer in time."""


@dataclass(slots=True)
class Piece:
    """What one choice gained: text, reasoning, tokens, and in the last piece the finish reason."""

    index: int
    text: str = ""
    reasoning: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()  # of this piece's tokens, except one that ended the choice


class Inbox:
    """Passes events from engine threads to one coroutine. Bounded: events beyond `limit` are dropped and logged
    once."""

    def __init__(self, limit: int, on_overflow: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[int, TokenEvent]] = deque()
        self._ready = asyncio.Event()
        self._notified = False
        self._limit = limit
        self._on_overflow = on_overflow
        self._overflowed = False

    def put(self, index: int, event: TokenEvent) -> None:
        """Add an event; may be called from any thread, never blocks."""
        if len(self._events) >= self._limit and event.finish_reason is None:
            if not self._overflowed:
                self._overflowed = True
                self._call(self._on_overflow)
            return
        self._events.append((index, event))
        if not self._notified:
            self._notified = True
            self._call(self._ready.set)

    def wake(self) -> None:
        """Make `take` return; call it on the loop's thread."""
        self._ready.set()

    async def take(self, timeout_s: float) -> list[tuple[int, TokenEvent]]:
        """Wait for events. Returns none after `wake`. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            await self._ready.wait()
        self._ready.clear()
        self._notified = False
        taken = []
        with contextlib.suppress(IndexError):
            while True:
                taken.append(self._events.popleft())
        return taken

    def _call(self, function: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: no coroutine waits
            self._loop.call_soon_threadsafe(function)


@dataclass(slots=True)
class _Gained:
    """What a batch of events adds to a choice."""

    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class Choice:
    """One engine request and the text of its tokens.

    `chat`: the answer is a text of its own, with reasoning separated if the model marks it; otherwise it continues the
    prompt's text. `echo_tokens`: the answer follows the echo of a prompt given as tokens.
    """

    def __init__(
        self,
        index: int,
        request: GenerationRequest,
        codec: TextCodec | None,
        stops: Sequence[str],
        *,
        chat: bool = False,
        echo_tokens: bool = False,
    ) -> None:
        self.index = index
        self.request = request
        self.tokens = 0
        self.finish_reason: Literal["stop", "length"] | None = None
        self.report: RequestReport | None = None
        self.ended = False  # the engine's last event has arrived
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self._decoder: TokenDecoder | ChannelSplitter | None = None
        if codec is not None and codec.harmony is not None and chat:
            self._decoder = ChannelSplitter(codec.harmony, codec.tokens)
        elif codec is not None and echo_tokens:
            self._decoder = codec.tokens.echo_decoder(request.prompt_tokens)
        elif codec is not None:
            self._decoder = codec.tokens.decoder(() if chat else request.prompt_tokens)
        self._stops = StopFinder(stops)
        shaping = request.sampling.shaping
        self._min_tokens = shaping.min_tokens if shaping is not None else 0
        self._stop_tokens = frozenset(shaping.stop_token_ids) if shaping is not None else frozenset()

    def take(self, events: Sequence[TokenEvent], eos: frozenset[int], now_s: float) -> Piece | None:
        """Process events; returns what they add to the answer, or None. Raises ApiError if the request failed."""
        was_open = self.finish_reason is None
        gained = _Gained()
        for event in events:
            self.ended = self.ended or event.finish_reason is not None
            self.report = event.report or self.report
            if self.finish_reason is not None:
                continue
            if event.token_id is not None:
                ends = event.token_id in eos or event.token_id in self._stop_tokens
                is_end = ends and event.finish_reason == "stop"
                self._add(event.token_id, is_end, gained)
                if event.logprobs is not None and not is_end:
                    gained.logprobs.append(event.logprobs)
                self.first_token_s = self.first_token_s or now_s
                self.last_token_s = now_s
            if event.finish_reason is not None and self.finish_reason is None:
                self._finish(event.finish_reason, event.error, gained)
        if was_open and (gained.ids or self.finish_reason is not None):
            text, reasoning = "".join(gained.texts), "".join(gained.reasoning)
            said = tuple(gained.logprobs)
            return Piece(self.index, text, reasoning, tuple(gained.ids), self.finish_reason, said)
        return None

    def _add(self, token: int, is_end: bool, gained: _Gained) -> None:
        self.tokens += 1
        gained.ids.append(token)
        if self._decoder is not None and not is_end:
            self._take(self._decoder.push(token), gained)

    def _finish(self, reason: FinishReason, error: str | None, gained: _Gained) -> None:
        if reason not in ("stop", "length"):
            raise failure(reason, error)
        self.finish_reason = reason
        if self._decoder is not None:
            self._take(self._decoder.flush(), gained)
            gained.texts.append(self._stops.flush())

    def _take(self, piece: str | tuple[Destination, str], gained: _Gained) -> None:
        """Process decoded text. Stop strings are searched for in the answer, not in reasoning."""
        destination, text = piece if isinstance(piece, tuple) else ("content", piece)
        if destination == "reasoning":
            gained.reasoning.append(text)
            return
        if self.tokens <= self._min_tokens:  # stop strings do not count before that
            gained.texts.append(text)
            return
        gained.texts.append(self._stops.push(text))
        if self._stops.stopped:
            self.finish_reason = "stop"


def failure(reason: FinishReason, error: str | None) -> ApiError:
    """The error answer for a request that the engine ended without finishing it."""
    if reason == "timeout":
        return ApiError(504, error or "the request took longer than the server allows", code="request_timeout")
    if reason == "cancelled":
        return ApiError(503, error or "the request was cancelled", code="cancelled", retry_after_s=5.0)
    return ApiError(500, f"the engine failed: {error or 'no reason given'}", code="engine_error")


class Generation:
    """All choices of one HTTP request. Used by one coroutine; `end` may be called from others on the same loop."""

    def __init__(
        self,
        engine: EngineAPI,
        choices: Sequence[Choice],
        *,
        timeout_s: float,
        cancel_timeout_s: float,
        queue_tokens_max: int,
    ) -> None:
        self.choices = choices
        self.end_reason: EndReason | None = None
        self._engine = engine
        self._deadline_s = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._cancel_timeout_s = cancel_timeout_s
        self._inbox = Inbox(queue_tokens_max, partial(self.end, "slow"))
        self._submitted = 0
        self.submitted_s: float | None = None

    def submit(self) -> None:
        """Submit every choice to the engine, or none. Raises ApiError."""
        self.submitted_s = time.monotonic()
        try:
            for choice in self.choices:
                self._engine.submit(choice.request, partial(self._inbox.put, choice.index))
                self._submitted += 1
        except Unsupported as error:
            self.close()
            raise bad_request(f"{error} (see {NOT_HERE})", error.param, "unsupported_parameter") from None
        except InvalidRequest as error:
            self.close()
            if "context" in str(error):
                raise context_overflow(self._engine.max_context_tokens, str(error), "prompt") from None
            raise bad_request(str(error)) from None
        except Overloaded as error:
            self.close()
            raise ApiError(429, str(error), code="rate_limit_exceeded", retry_after_s=error.retry_after_s) from None

    def end(self, reason: EndReason) -> None:
        """Cancel everything and make `pieces` raise the reason; the first call's reason counts."""
        if self.end_reason is None:
            self.end_reason = reason
            self.close()
            self._inbox.wake()

    def close(self) -> None:
        """Cancel the requests that have not ended in the engine."""
        for choice in self.choices[: self._submitted]:
            if not choice.ended:
                self._engine.cancel(choice.request.request_id)

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """Yield what the choices gain until all have finished. Raises ApiError, ClientGone or SlowReader."""
        while any(choice.finish_reason is None for choice in self.choices):
            found = await self._step(self._deadline_s - time.monotonic())
            if found:
                yield found

    async def reports(self) -> bool:
        """Wait for the reports of choices that ended at a stop string; False when one did not arrive in time."""
        give_up_s = time.monotonic() + self._cancel_timeout_s
        while any(not choice.ended for choice in self.choices):
            try:
                await self._step(give_up_s - time.monotonic())
            except ApiError:
                if self.end_reason is not None:
                    raise
                log.warning("the engine sent no report of a cancelled request within %.0f s", self._cancel_timeout_s)
                return False
        return True

    async def _step(self, timeout_s: float) -> list[Piece]:
        try:
            events = await self._inbox.take(timeout_s)
        except TimeoutError:
            raise failure("timeout", f"the request did not finish within {self._timeout_s:g} s") from None
        self._raise_if_ended()
        by_choice: dict[int, list[TokenEvent]] = {}
        for index, event in events:
            by_choice.setdefault(index, []).append(event)
        found, now_s = [], time.monotonic()
        for index, of_choice in by_choice.items():
            choice = self.choices[index]
            piece = choice.take(of_choice, self._engine.eos_token_ids, now_s)
            if piece is not None:
                found.append(piece)
            if choice.finish_reason is not None and not choice.ended:
                self._engine.cancel(choice.request.request_id)
        return found

    def _raise_if_ended(self) -> None:
        if self.end_reason == "gone":
            raise ClientGone
        if self.end_reason == "slow":
            raise SlowReader
        if self.end_reason == "shutdown":
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=5.0)
