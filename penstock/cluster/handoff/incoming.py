"""The decode part of a request: reserve room, wait for the hand-off, then the engine generates the rest.

However a part ends, its room, its deadline and its prompt are freed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from penstock.cluster.handoff.buffer import DecodeBuffer
from penstock.cluster.handoff.deadlines import Deadline, Deadlines
from penstock.cluster.handoff.outgoing import CAN_READ, HAS, OnEvent
from penstock.cluster.handoff.part_engine import PartEngine
from penstock.cluster.messages import PlacedRequest
from penstock.cluster.wire_types import within
from penstock.core.keys import BlockKey, KeyChain
from penstock.engine.api import GenerationRequest, InvalidRequest, Overloaded, TokenEvent
from penstock.pool.api import Pool, PoolError
from penstock.pool.losses import count_loss
from penstock.process.guarded_thread import GuardedWorker
from penstock.process.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

EARLY_MAX = 4096  # hand-offs opened before the router has placed their part here
EARLY_OF_SOURCE_MAX = 1024  # of these, from one address
OPENINGS_MAX = 8  # that wait, of one hand-off
LOOKUP_THREADS = 4
LOOKUPS_WAITING_MAX = 1024
OPEN_TIMEOUT_S_MAX = 3600.0  # limit of the timeout that a prefill engine may ask for

Reply = Callable[[bytes | PoolError], None]


@dataclass(slots=True, eq=False)
class _Opening:
    """A prefill engine that waits for room."""

    reads: bool
    reply: Reply
    deadline_s: float
    source: str = ""
    answered: bool = False
    deadline: Deadline | None = None


@dataclass(slots=True, eq=False)
class _Part:
    placed: PlacedRequest
    request: GenerationRequest
    on_event: OnEvent
    keys: list[BlockKey]
    granted: bool = False
    started: bool = False
    in_buffer: bool = True
    cancelled: bool = False
    openings: list[_Opening] = field(default_factory=list)
    deadline: Deadline | None = None


class Incoming:
    """Hand-offs of a decode engine, by name. Contract: `relay.HandoffService`. Any thread may call; each part gets
    exactly one last event."""

    def __init__(
        self,
        engine: PartEngine,
        buffer: DecodeBuffer,
        storage: Pool,
        hand_off_timeout_s: float,
        lookup_timeout_s: float,
    ) -> None:
        self._engine = engine
        self._buffer = buffer
        self._storage = storage
        self._hand_off_timeout_s = hand_off_timeout_s
        self._lookup_timeout_s = lookup_timeout_s
        self._lock = threading.Lock()
        self._parts: dict[str, _Part] = {}
        self._early: dict[str, list[_Opening]] = {}
        self._early_of: Counter[str] = Counter()  # openings of `_early`, by source address
        self._closed = False
        self._lookups = GuardedWorker("penstock-relay-lookup", LOOKUPS_WAITING_MAX, threads=LOOKUP_THREADS)
        self._deadlines = Deadlines("penstock-hand-off-deadlines")

    def __len__(self) -> int:
        """Known hand-offs, placed by the router or not yet."""
        with self._lock:
            return len(self._parts) + len(self._early)

    # --- from the router ---

    def submit(self, placed: PlacedRequest, request: GenerationRequest, on_event: OnEvent) -> None:
        """Begin a part. `request` is the placed request for the engine, without the token that comes with the hand-off.
        Raises InvalidRequest or Overloaded."""
        name = placed.hand_off_id
        if placed.sampling.max_tokens < 2 and not placed.decode_samples:
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
            self._not_early(part.openings)
            part.deadline = self._deadlines.after(self._hand_off_timeout_s, partial(self._too_late, part))
        try:
            self._buffer.reserve(name, part.keys, partial(self._granted, part))
        except Exception as error:
            for opening in self._forget(part) or ():
                self._reply(opening, PoolError("full", str(error)))
            if isinstance(error, ValueError):
                raise InvalidRequest(str(error)) from None
            raise

    def cancel(self, name: str) -> bool:
        """End a part soon; False when there is none of that name."""
        with self._lock:
            part = self._parts.get(name)
            if part is None:
                return False
            started, part.cancelled = part.started, True
        if started:
            self._engine.cancel(name)
        else:
            self._end(part, TokenEvent(None, "cancelled"))
        return True

    def waiting(self) -> tuple[int, int]:
        """Number and tokens of the requests that are not in the engine yet."""
        with self._lock:
            lengths = [len(part.request.prompt_tokens) for part in self._parts.values() if not part.started]
        return len(lengths), sum(lengths)

    # --- from prefill engines ---

    def opening(self, name: str, reads: bool, timeout_s: float, reply: Reply, source: str = "") -> Callable[[], None]:
        """A prefill engine opens a hand-off: `reply` is called once, when there is room, or with an error, within
        `timeout_s`. Call the result to withdraw the opening."""
        timeout_s = within(timeout_s, OPEN_TIMEOUT_S_MAX)
        opening = _Opening(reads, reply, time.monotonic() + timeout_s, source)
        withdraw = partial(self._withdraw, name, opening)
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
            elif part is None and source and self._early_of[source] >= EARLY_OF_SOURCE_MAX:
                detail = f"{EARLY_OF_SOURCE_MAX} hand-offs were opened from this address before the router named them"
                error = PoolError("dropped", detail)
            elif not granted and len(part.openings if part is not None else self._early.get(name, ())) >= OPENINGS_MAX:
                error = PoolError("dropped", f"the hand-off is being opened {OPENINGS_MAX} times already")
            elif not granted:
                if part is not None:
                    part.openings.append(opening)
                else:
                    self._early.setdefault(name, []).append(opening)
                    self._early_of[source] += 1
                opening.deadline = self._deadlines.after(timeout_s, partial(self._give_up, name, opening))
        if error is not None:
            if error.reason == "dropped":
                count_loss("hand_offs_too_many")
                rare.warning("early", "a hand-off is not opened: %s", error)
            self._reply(opening, error)
        elif part is not None and granted:
            self._answer(part, opening)
        return withdraw

    def _not_early(self, openings: list[_Opening]) -> None:
        """Uncount openings that left `_early`; the lock is held."""
        for opening in openings:
            self._early_of[opening.source] -= 1
            if not self._early_of[opening.source]:
                del self._early_of[opening.source]

    def _removed(self, name: str, opening: _Opening) -> tuple[bool, bool]:
        """Remove a waiting opening; returns whether it was waiting, and whether the router has placed the part."""
        with self._lock:
            part = self._parts.get(name)
            waiting = part.openings if part is not None else self._early.get(name, [])
            if opening not in waiting:
                return False, part is not None
            waiting.remove(opening)
            if part is None:
                self._not_early([opening])
                if not waiting:
                    del self._early[name]
            return True, part is not None

    def _withdraw(self, name: str, opening: _Opening) -> None:
        """Drop an opening whose client has stopped waiting."""
        self._removed(name, opening)
        with self._lock:
            opening.answered = True
        if opening.deadline is not None:
            opening.deadline.cancel()

    def _granted(self, part: _Part) -> None:
        """Answer the openings of a part for which there is room now."""
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
        """Reply which blocks are present, and which can be read from the pool."""
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
                self._without_lookup(error)
            keys = zip(part.keys, here, strict=True)
            self._reply(opening, bytes(HAS if h else CAN_READ if key in readable else 0 for key, h in keys))

        def failed(error: Exception) -> None:
            self._without_lookup(error)
            self._reply(opening, bytes(HAS if h else 0 for h in here))

        if not self._lookups.put(look_up, failed):
            failed(PoolError("dropped", f"{LOOKUPS_WAITING_MAX} lookups wait, or the engine is closing"))

    def _without_lookup(self, error: Exception) -> None:
        count_loss("decode_lookups")
        rare.warning("lookup", "a decode read is done without this host's blocks: %s", error)

    def _reply(self, opening: _Opening, answer: bytes | PoolError) -> None:
        with self._lock:
            if opening.answered:
                return
            opening.answered = True
        if opening.deadline is not None:
            opening.deadline.cancel()
        opening.reply(answer)

    def _give_up(self, name: str, opening: _Opening) -> None:
        """End an opening after its timeout."""
        waited, named = self._removed(name, opening)
        if not waited:
            return
        reason = "the decode buffer is full" if named else "the router has not named the hand-off"
        count_loss("hand_offs_not_opened")
        rare.warning("opening", "hand-off %s is not opened: %s", name, reason)
        self._reply(opening, PoolError("full" if named else "deadline", reason))

    def handed_over(self, name: str, token: int, missing: int) -> PoolError | None:
        """A hand-off is complete, except for `missing` blocks, and `token` is its first token: begin to decode. Returns
        the error when that is refused. A second call does nothing."""
        with self._lock:
            part = self._parts.get(name)
            if part is None or not part.granted:
                return PoolError("missing", f"hand-off {name!r} is not expected")
            if part.started:
                return None
            part.started = True
        if part.deadline is not None:
            part.deadline.cancel()
        missing = min(missing, len(part.keys))
        if missing:
            count_loss("blocks_not_handed_over", missing)
            rare.warning(
                "missing", "%d blocks of %s were not handed over; they are loaded or computed here", missing, name
            )
        request = part.request
        if not part.placed.decode_samples:
            request = replace(
                request,
                prompt_tokens=[*request.prompt_tokens, token],
                sampling=replace(request.sampling, max_tokens=request.sampling.max_tokens - 1),
                first_index=request.first_index + 1,
            )
        try:
            self._engine.submit(request, partial(self._event, part))
        except (Overloaded, InvalidRequest) as error:
            refused = TokenEvent(None, "restart" if isinstance(error, Overloaded) else "error", str(error))
            self._end(part, refused)
            return PoolError("dropped", str(error))
        except Exception as error:  # noqa: BLE001 (the engine does not know the request, so it would never end)
            count_loss("failed_to_begin")
            rare.exception("begin", "request %s could not begin to decode: %r", name, error)
            self._end(part, TokenEvent(None, "error", f"the request could not begin to decode: {error!r}"))
            return PoolError("dropped", repr(error))
        if part.cancelled:  # cancelled before the engine knew the request
            self._engine.cancel(name)
        return None

    # --- from the engine ---

    def _event(self, part: _Part, event: TokenEvent) -> None:
        """On the engine's control thread. At the first token all blocks were copied to the device: the room in the
        buffer is freed."""
        if part.in_buffer:
            part.in_buffer = False
            self._buffer.release(part.placed.hand_off_id)
        if event.finish_reason is None:
            part.on_event(event)
        else:
            self._end(part, event)

    def _end(self, part: _Part, event: TokenEvent) -> None:
        name = part.placed.hand_off_id
        openings = self._forget(part)
        if openings is None:
            return
        try:
            self._buffer.release(name)
            for opening in openings:
                self._reply(opening, PoolError("missing", f"hand-off {name!r} ended: {event.finish_reason}"))
        finally:
            part.on_event(event)

    def _forget(self, part: _Part) -> list[_Opening] | None:
        """Remove a part and cancel its deadline; returns its waiting openings, which the caller must answer. None when
        it was not known."""
        with self._lock:
            if self._parts.get(part.placed.hand_off_id) is not part:
                return None
            del self._parts[part.placed.hand_off_id]
            openings, part.openings = part.openings, []
        if part.deadline is not None:
            part.deadline.cancel()
        return openings

    # --- deadlines ---

    def _too_late(self, part: _Part) -> None:
        with self._lock:
            started = part.started
        if not started:
            why = "was not complete" if part.granted else "found no room in the decode buffer"
            count_loss("hand_offs_late")
            rare.warning("late", "hand-off %s %s within %g s", part.placed.hand_off_id, why, self._hand_off_timeout_s)
            self._end(part, TokenEvent(None, "restart", f"the hand-off {why} within {self._hand_off_timeout_s:g} s"))

    def close(self, timeout_s: float) -> None:
        """End the parts that have not begun to decode; to be called before the engine is closed."""
        with self._lock:
            self._closed = True
            early = [opening for openings in self._early.values() for opening in openings]
            self._early.clear()
            self._early_of.clear()
            parts = [part for part in self._parts.values() if not part.started]
        self._lookups.stop()
        for opening in early:
            self._reply(opening, PoolError("closed", "the decode engine is closing"))
        for part in parts:
            self._end(part, TokenEvent(None, "restart", "the decode engine is closing"))
        self._deadlines.close(timeout_s)
        self._lookups.close(timeout_s)
