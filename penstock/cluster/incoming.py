"""The decode part of a request: reserve room, wait for the hand-off, then have the engine generate the rest."""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

from penstock.cluster.buffer import DecodeBuffer
from penstock.cluster.outgoing import CAN_READ, HAS, OnEvent
from penstock.cluster.placed import PlacedRequest
from penstock.core.keys import BlockKey, KeyChain
from penstock.engine.api import GenerationRequest, InvalidRequest, Overloaded, TokenEvent
from penstock.engine.engine import Engine
from penstock.pool.api import Pool, PoolError

log = logging.getLogger(__name__)

EARLY_MAX = 4096  # hand-offs opened before the router's word of them came
LOOKUP_THREADS = 4

Reply = Callable[[bytes | PoolError], None]


@dataclass(slots=True, eq=False)
class _Opening:
    """A prefill engine that waits for room."""

    reads: bool
    reply: Reply
    deadline_s: float
    answered: bool = False


@dataclass(slots=True, eq=False)
class _Part:
    placed: PlacedRequest
    request: GenerationRequest
    on_event: OnEvent
    keys: list[BlockKey]
    granted: bool = False
    started: bool = False
    in_buffer: bool = True
    openings: list[_Opening] = field(default_factory=list)


class Incoming:
    """Hand-offs of a decode engine, by their name. Contract: `relay.Desk`. Any thread may call; each part gets exactly
    one last event."""

    def __init__(
        self, engine: Engine, buffer: DecodeBuffer, storage: Pool, hand_off_timeout_s: float, lookup_timeout_s: float
    ) -> None:
        self._engine = engine
        self._buffer = buffer
        self._storage = storage
        self._hand_off_timeout_s = hand_off_timeout_s
        self._lookup_timeout_s = lookup_timeout_s
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._parts: dict[str, _Part] = {}
        self._early: dict[str, list[_Opening]] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self._closed = False
        self._lookups = ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="penstock-relay-lookup")
        self._thread = threading.Thread(target=self._watch, name="penstock-hand-off-deadlines", daemon=True)
        self._thread.start()

    # --- from the router ---

    def submit(self, placed: PlacedRequest, request: GenerationRequest, on_event: OnEvent) -> None:
        """`request` is the placed one as the engine gets it, but for the token that comes with the hand-off. Raises
        InvalidRequest or Overloaded."""
        name = placed.hand_off_id
        if placed.sampling.max_tokens < 2:
            raise InvalidRequest("max_tokens is 1; a decode part needs at least one token after the first")
        chain = KeyChain(self._engine.check(request), self._engine.config.block_tokens)
        part = _Part(placed, request, on_event, chain.extend(request.prompt_tokens))
        with self._lock:
            if self._closed:
                raise Overloaded("the engine is stopping", retry_after_s=10.0)
            if name in self._parts:
                raise InvalidRequest(f"hand-off {name!r} is known already")
            self._parts[name] = part
            part.openings = self._early.pop(name, [])
            self._at(self._hand_off_timeout_s, partial(self._too_late, part))
        try:
            self._buffer.reserve(name, part.keys, partial(self._granted, part))
        except ValueError as error:
            with self._lock:
                del self._parts[name]
            for opening in part.openings:
                opening.reply(PoolError("full", str(error)))
            raise InvalidRequest(str(error)) from None

    def cancel(self, name: str) -> bool:
        """End a part soon; False when there is none of that name."""
        with self._lock:
            part = self._parts.get(name)
            started = part is not None and part.started
        if part is None:
            return False
        if started:
            self._engine.cancel(name)
        else:
            self._end(part, TokenEvent(None, "cancelled"))
        return True

    def waiting(self) -> tuple[int, int]:
        """Requests that are not in the engine yet, and their tokens."""
        with self._lock:
            lengths = [len(part.request.prompt_tokens) for part in self._parts.values() if not part.started]
        return len(lengths), sum(lengths)

    # --- from prefill engines ---

    def opening(self, name: str, reads: bool, timeout_s: float, reply: Reply) -> None:
        opening = _Opening(reads, reply, time.monotonic() + timeout_s)
        error: PoolError | None = None
        with self._lock:
            part = self._parts.get(name)
            granted = part is not None and part.granted
            if self._closed:
                error = PoolError("closed", "the decode engine is closing")
            elif part is not None and part.started:
                error = PoolError("missing", f"hand-off {name!r} has ended")
            elif part is None and len(self._early) >= EARLY_MAX:
                error = PoolError("dropped", f"{EARLY_MAX} hand-offs were opened before the router named them")
            elif not granted:
                (part.openings if part is not None else self._early.setdefault(name, [])).append(opening)
                self._at(timeout_s, partial(self._give_up, name, opening))
        if error is not None:
            reply(error)
        elif part is not None and granted:
            self._answer(part, opening)

    def _granted(self, part: _Part) -> None:
        """There is room for the part."""
        with self._lock:
            part.granted = True
            openings, part.openings = part.openings, []
            gone = self._parts.get(part.placed.hand_off_id) is not part
        for opening in openings:
            if gone:
                self._reply(opening, PoolError("missing", "the hand-off ended"))
            else:
                self._answer(part, opening)

    def _answer(self, part: _Part, opening: _Opening) -> None:
        """Say which blocks are here, and which can be read."""
        here = self._buffer.has(part.keys)
        if not opening.reads or all(here):
            self._reply(opening, bytes(HAS if h else 0 for h in here))
            return

        def look_up() -> None:
            absent = [key for key, h in zip(part.keys, here, strict=True) if not h]
            timeout_s = min(self._lookup_timeout_s, max(0.01, opening.deadline_s - time.monotonic()))
            readable: set[BlockKey] = set()
            try:
                found = self._storage.lookup(absent, timeout_s)
                size = self._buffer.block_bytes
                readable = {k for k, hit in zip(absent, found, strict=True) if hit and hit.size_bytes == size}
            except PoolError as error:
                log.warning("a decode read does without this host: %s", error)
            keys = zip(part.keys, here, strict=True)
            self._reply(opening, bytes(HAS if h else CAN_READ if key in readable else 0 for key, h in keys))

        try:
            self._lookups.submit(look_up)
        except RuntimeError:
            self._reply(opening, PoolError("closed", "the decode engine is closing"))

    def _reply(self, opening: _Opening, answer: bytes | PoolError) -> None:
        with self._lock:
            if opening.answered:
                return
            opening.answered = True
        opening.reply(answer)

    def _give_up(self, name: str, opening: _Opening) -> None:
        """The prefill engine has waited for as long as it said."""
        with self._lock:
            part = self._parts.get(name)
            waiting = part.openings if part is not None else self._early.get(name, [])
            if opening not in waiting:
                return
            waiting.remove(opening)
            if part is None and not waiting:
                del self._early[name]
        reason = "the router has not named the hand-off" if part is None else "the decode buffer is full"
        self._reply(opening, PoolError("deadline" if part is None else "full", reason))

    def handed_over(self, name: str, token: int, missing: int) -> PoolError | None:
        with self._lock:
            part = self._parts.get(name)
            if part is None or not part.granted:
                return PoolError("missing", f"hand-off {name!r} is not expected")
            if part.started:
                return None
            part.started = True
        if missing:
            log.info("%d blocks of %s were not handed over; they are loaded or computed here", missing, name)
        request = part.request
        sampling = replace(request.sampling, max_tokens=request.sampling.max_tokens - 1)
        waited_s = request.waited_s
        request = replace(
            request,
            prompt_tokens=[*request.prompt_tokens, token],
            sampling=sampling,
            waited_s=waited_s,
            first_index=request.first_index + 1,
        )
        try:
            self._engine.submit(request, partial(self._event, part))
        except (Overloaded, InvalidRequest) as error:
            refused = TokenEvent(None, "restart" if isinstance(error, Overloaded) else "error", str(error))
            self._end(part, refused)
            return PoolError("dropped", str(error))
        return None

    # --- from the engine ---

    def _event(self, part: _Part, event: TokenEvent) -> None:
        """On the engine's control thread. With the first token everything was copied up: the buffer is free."""
        if part.in_buffer:
            part.in_buffer = False
            self._buffer.release(part.placed.hand_off_id)
        if event.finish_reason is None:
            part.on_event(event)
        else:
            self._end(part, event)

    def _end(self, part: _Part, event: TokenEvent) -> None:
        name = part.placed.hand_off_id
        with self._lock:
            if self._parts.get(name) is not part:
                return
            del self._parts[name]
            openings, part.openings = part.openings, []
        self._buffer.release(name)
        for opening in openings:
            self._reply(opening, PoolError("missing", f"hand-off {name!r} ended: {event.finish_reason}"))
        part.on_event(event)

    # --- deadlines ---

    def _too_late(self, part: _Part) -> None:
        with self._lock:
            started = part.started
        if not started:
            why = "was not complete" if part.granted else "found no room in the decode buffer"
            self._end(part, TokenEvent(None, "restart", f"the hand-off {why} within {self._hand_off_timeout_s:g} s"))

    def _at(self, delay_s: float, action: Callable[[], None]) -> None:
        """With the lock held."""
        self._serial += 1
        heapq.heappush(self._timers, (time.monotonic() + delay_s, self._serial, action))
        self._changed.notify()

    def _watch(self) -> None:
        while True:
            with self._lock:
                if self._closed:
                    return
                wait_s = self._timers[0][0] - time.monotonic() if self._timers else None
                if wait_s is None or wait_s > 0:
                    self._changed.wait(wait_s)
                    continue
                _, _, action = heapq.heappop(self._timers)
            action()

    def close(self, timeout_s: float) -> None:
        """End what has not begun to decode; before the engine is closed."""
        with self._lock:
            self._closed = True
            self._changed.notify()
            early = [opening for openings in self._early.values() for opening in openings]
            self._early.clear()
            parts = [part for part in self._parts.values() if not part.started]
        self._lookups.shutdown(wait=False, cancel_futures=True)
        for opening in early:
            self._reply(opening, PoolError("closed", "the decode engine is closing"))
        for part in parts:
            self._end(part, TokenEvent(None, "restart", "the decode engine is closing"))
        self._thread.join(timeout_s)
