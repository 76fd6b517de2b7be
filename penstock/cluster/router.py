"""The router: many engines behind the interface of one. It owns the inter-engine brain and carries out its decisions.

Threading: public methods may be called from any thread. Everything else, the cluster port included, runs on one event
loop in a thread of its own; `on_event` is called from it.

Requests are known by keys of the router's own, which no other request has, not even one of the router before it. What
a client calls its request is a label: with the whole content of the request it finds what engines still have of an
answer, or the answer that another connection waits for already (`Routed.shared`); it never ends anything.

A fault ends the request that it was met at, and nothing else (`_guarded`, `_fail`); one that ends the thread ends every
request with its error, and the process (`on_failed`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from penstock.cluster import wire
from penstock.cluster.engine_accounts import EngineAccounts
from penstock.cluster.held import asked_digest
from penstock.cluster.merged_report import merged_report
from penstock.cluster.orphans import Asked, Orphans
from penstock.cluster.placed import Part
from penstock.cluster.port import ClusterPort, Engine
from penstock.cluster.routed import Routed, RouterSettings, fresh_answer, part_of, placed_request
from penstock.cluster.router_stats import router_stats
from penstock.cluster.wire_types import NAME_CHARACTERS_MAX, TENANT_CHARACTERS_MAX
from penstock.core.cluster.answer import Answer, Outcome
from penstock.core.cluster.inter_engine import InterEngineScheduler
from penstock.core.cluster.placing import Decision, DecisionFailed, GiveUp, Place, Replan, Revoke, TooManyRequests
from penstock.core.cluster.seen_prefixes import SeenPrefixes
from penstock.core.operations import FinishReason
from penstock.engine.api import (
    EngineStats,
    GenerationRequest,
    InvalidRequest,
    OnEvent,
    Overloaded,
    RequestReport,
    TokenEvent,
    check_request,
    tell,
)
from penstock.guarded_thread import GuardedThread
from penstock.rate_limited_log import RateLimitedLog
from penstock.transport.secret import Secret

__all__ = ["ClusterEngine", "RouterSettings"]

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

TICK_S = 0.25
ANSWER_TIMEOUT_S = 5.0
RECENT_MAX = 256
FAILING_S = 5.0  # a router that has decided nothing for so long because of faults says that it is not healthy
SHARING_MAX = 64  # clients of one answer

T = TypeVar("T")


class ClusterEngine:
    """All engines that register on a cluster port, as one. Contract: `engine.api.EngineAPI`."""

    def __init__(self, sock: socket.socket, secret: Secret, settings: RouterSettings) -> None:
        """`sock` is bound; it is listened on from here on, and closed by `close`."""
        self.settings = settings
        self.max_context_tokens = 0
        self.vocab_size = 0  # 0 until the first engine has registered
        self.eos_token_ids: frozenset[int] = frozenset()
        self.model: str | None = None
        self.counters: Counter[str] = Counter()
        self.recent: deque[RequestReport] = deque(maxlen=RECENT_MAX)
        self.start_s = time.monotonic()
        self.requests: dict[str, Routed] = {}  # by the router's own keys
        self.on_failed: Callable[[], None] = lambda: None
        self._of_client: dict[str, Routed] = {}  # by the id that it was submitted under
        self._shared: dict[Asked, Routed] = {}
        self._serial = 0
        self._failing_since_s: float | None = None
        self._failure: str | None = None
        self.port = ClusterPort(self, sock, secret, settings.lease_s)
        self.brain = InterEngineScheduler(settings.brain)
        self._accounts: EngineAccounts | None = None
        self._seen: SeenPrefixes | None = None
        self._orphans = Orphans(settings.claim_s)
        # Attempts of two routers are never the same: an engine may still be at one of the router before this one.
        self._attempt_base = int.from_bytes(os.urandom(4)) << 16
        self._early: dict[str, Routed] = {}  # wait for engines that may have them
        self._usable_s = time.monotonic()  # when engines could serve last
        self._deciding = False
        self._ticking: asyncio.Task[None] | None = None
        self._fatal: str | None = None
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = GuardedThread("penstock-router", self._run, failed=self._ended_by)
        self._thread.start()
        self._started.wait(ANSWER_TIMEOUT_S)

    # -- callers ------------------------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> None:
        """See EngineAPI. One with a `resume_label` that comes again, with everything else the same, gets the same
        answer from its first token on: that of another connection which waits for it still, where that is what it
        would get by itself too, or what engines have of it from the router before this one."""
        if self._fatal:
            raise Overloaded(self._fatal, retry_after_s=10.0)
        if not self.vocab_size:
            raise Overloaded(self.healthy()[1], 1.0)
        check_request(request, self.vocab_size, self.max_context_tokens)
        _check_names(request)
        if request.request_id in self._of_client:
            raise InvalidRequest(f"request_id {request.request_id!r} is in use for another request")
        digest = asked_digest(request.prompt_tokens, request.sampling, request.tenant)
        asked = (request.resume_label, digest) if request.resume_label else None
        end_tokens = frozenset() if request.sampling.ignore_eos else self.eos_token_ids
        answer = Answer(request.sampling.max_tokens, end_tokens, self._attempt_base)
        routed = Routed("", request, {request.request_id: on_event}, time.monotonic(), answer, asked)
        if not self._known_answer(routed) and len(self.requests) >= self.settings.max_open:
            raise Overloaded(self._full(), 1.0)
        self._call(partial(self._submitted, routed))

    def _known_answer(self, routed: Routed) -> Routed | None:
        """The open request whose answer this one may have too."""
        known = self._shared.get(routed.asked) if routed.asked is not None else None
        return known if known is not None and len(known.clients) < SHARING_MAX else None

    def _full(self) -> str:
        return f"{self.settings.max_open} requests are open; that is the limit"

    def cancel(self, request_id: str) -> None:
        """See EngineAPI."""
        self._call(partial(self._cancelled, request_id))

    def stats(self) -> EngineStats:
        """See EngineAPI."""
        return self.ask(lambda: router_stats(self.requests, self.port, self.brain, self.counters))

    def healthy(self) -> tuple[bool, str]:
        """See EngineAPI: whether engines are there that can serve a request."""
        if self._fatal or not self._thread.alive:
            return False, self._fatal or "the router's thread ended"
        failing_s = self._failing_since_s
        if failing_s is not None and time.monotonic() - failing_s > FAILING_S:
            return False, f"internal errors: nothing was decided for {time.monotonic() - failing_s:.0f} s"
        roles = {engine.card.role for engine in list(self.port.engines.values())}
        if "mixed" in roles or {"prefill", "decode"} <= roles:
            return True, "ok"
        if not roles:
            return False, "no engine has registered"
        return False, f"only {roles.pop()} engines have registered; a request needs both, or a mixed one"

    @property
    def failure(self) -> str | None:
        """Why the router failed inside and serves no more; None while it serves, and after `close`."""
        return self._failure

    def close(self, timeout_s: float) -> None:
        """See EngineAPI. Requests end; engines are told nothing, and register with the next router."""
        end_s = time.monotonic() + timeout_s
        if self._thread.alive and self._failure is None:
            stopped = asyncio.run_coroutine_threadsafe(self._stop(), self._loop)
            try:
                stopped.result(timeout_s)
            except TimeoutError:
                log.error("the router did not stop within %.1f s", timeout_s)
            self._call(self._loop.stop)
        if self._thread.alive:
            self._thread.join(max(0.1, end_s - time.monotonic()))

    def ask(self, question: Callable[[], T]) -> T:
        """The answer of the router's thread. Raises TimeoutError."""

        async def answer() -> T:
            return question()

        if not self._thread.alive:
            raise TimeoutError("the router has stopped")
        return asyncio.run_coroutine_threadsafe(answer(), self._loop).result(ANSWER_TIMEOUT_S)

    def remember(self, prompt_tokens: Sequence[int], tenant: str = "") -> None:
        """The pool holds the KV of these tokens: what a router learns as it serves, told to one that has just begun.
        Without engines nothing is remembered. Raises TimeoutError."""

        def add() -> None:
            if self._seen is not None:
                self._seen.add(prompt_tokens, tenant)

        self.ask(add)

    # -- the loop -----------------------------------------------------------------------------------------------

    def _call(self, function: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._guarded, function)
        except RuntimeError:  # closed: everything was ended
            log.debug("the router is closed")

    def _guarded(self, function: Callable[[], None], routed: Routed | None = None) -> bool:
        """Whether it ran to its end. A fault ends the request that it is about, if any, and no other one."""
        try:
            function()
        except Exception as error:
            self.counters["internal_errors"] += 1
            rare.exception("router", "the router failed at %s: %r", getattr(function, "__name__", function), error)
            if routed is not None:
                self._fail(routed, error)
            return False
        return True

    def _fail(self, routed: Routed, error: Exception) -> None:
        """A fault was met at this request: it ends."""
        self._guarded(partial(self._cancel_parts, routed, tuple(routed.answer.parts)))
        self._end(routed, "error", f"internal error: {error!r}")

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self.port.start())
            self._ticking = self._loop.create_task(self._tick())
            self._ticking.add_done_callback(self._stopped_ticking)
            self._started.set()
            self._loop.run_forever()
        except BaseException as error:
            self._failure = self._fatal = self._fatal or f"internal error: {error!r}"
            raise
        finally:
            self._started.set()
            self._fatal = self._fatal or "the router is closed"
            self._end_all("error", self._fatal)
            self._loop.close()

    def _stopped_ticking(self, ticking: asyncio.Task[None]) -> None:
        """Without its clock a router keeps no promise of time: it ends, unless it was to."""
        if not ticking.cancelled():
            self._failure = self._fatal = f"internal error: {ticking.exception()!r}"
            self._loop.stop()
            self.on_failed()

    def _ended_by(self, _: Exception) -> None:
        self.on_failed()

    async def _stop(self) -> None:
        self._fatal = "the router is closed"
        if self._ticking is not None:
            self._ticking.cancel()
        self._end_all("cancelled", "the router is shutting down")
        await self.port.close()

    async def _tick(self) -> None:
        """What comes with time alone."""
        while True:
            await asyncio.sleep(TICK_S)
            for due in (self._begin_early, self._cancel_unclaimed, self._give_up_without_engines, self._decide_soon):
                self._guarded(due)

    def _begin_early(self) -> None:
        """Engines have had their time to register with what they have."""
        if self._early and time.monotonic() >= self.start_s + self.settings.grace_s:
            early, self._early = self._early, {}
            for routed in early.values():
                self._guarded(partial(self._begin, routed), routed)

    def _cancel_unclaimed(self) -> None:
        for name, request_id, attempt in self._orphans.unclaimed(time.monotonic()):
            self.counters["unclaimed"] += 1
            self._cancel_part(name, request_id, attempt)

    def _give_up_without_engines(self) -> None:
        now = time.monotonic()
        healthy, why = self.healthy()
        if healthy:
            self._usable_s = now
        elif now - self._usable_s > self.settings.no_engine_s:
            for routed in list(self.requests.values()):
                if not routed.answer.parts and now - routed.arrival_s > self.settings.no_engine_s:
                    rare.warning("no engine", "request %s ends: %s", routed.id, why)
                    self._end(routed, "cancelled", f"{why}, for {now - self._usable_s:.0f} s")

    # -- requests -----------------------------------------------------------------------------------------------

    def _submitted(self, routed: Routed) -> None:
        (client, on_event), *_ = routed.clients.items()
        if self._fatal or client in self._of_client:
            tell(on_event, TokenEvent(None, "error", self._fatal or f"request_id {client!r} is in use"))
            return
        known = self._known_answer(routed)
        if known is not None:
            self._share(known, client, on_event)
            return
        if len(self.requests) >= self.settings.max_open:
            tell(on_event, TokenEvent(None, "cancelled", self._full()))
            return
        self._serial += 1
        routed.id = f"{self.port.router_id}-{self._serial}"
        self.requests[routed.id] = self._of_client[client] = routed
        if routed.shared and routed.asked is not None:
            self._shared.setdefault(routed.asked, routed)
        self.counters["requests"] += 1
        routed.mark("wait_router", routed.arrival_s)
        if routed.asked is not None and time.monotonic() < self.start_s + self.settings.grace_s:
            self._early[routed.id] = routed
            routed.waiting = "engines may register with it"
            return
        self._guarded(partial(self._begin, routed), routed)

    def _share(self, known: Routed, client: str, on_event: OnEvent) -> None:
        """The same request over another connection gets the whole answer from here on. Whoever waits for it already
        goes on: one that is gone is cancelled by its own side."""
        self.counters["shared"] += 1
        known.clients[client] = on_event
        self._of_client[client] = known
        for token in known.answer.tokens:
            tell(on_event, TokenEvent(token))

    def _begin(self, routed: Routed) -> None:
        """Go on where engines have it from the router before this one; else hand it to the brain."""
        if self.requests.get(routed.id) is not routed:
            return
        if routed.asked is not None and self._adopt(routed, routed.asked):
            return
        self._queue(routed)

    def _queue(self, routed: Routed) -> None:
        request = routed.request
        assert self._seen is not None, "no engine has registered, and a request was checked against it"
        routed.waiting = "its turn"
        routed.hit_tokens = self._seen.hit_tokens(request.prompt_tokens, request.tenant)
        try:
            self.brain.submit(
                routed.id, len(request.prompt_tokens), routed.hit_tokens, request.sampling.max_tokens, time.monotonic()
            )
        except (TooManyRequests, ValueError) as error:
            self._end(routed, "cancelled", str(error))
            return
        self._decide_soon()

    def _adopt(self, routed: Routed, asked: Asked) -> bool:
        """Whether engines have this request, from its first token on; what they have is sent. It goes on under the key
        that they know it by."""
        claimed = self._orphans.claim(asked)
        if claimed is None:
            return False
        key, found, rest = claimed
        for name, request_id, attempt in rest:
            self._cancel_part(name, request_id, attempt)
        answer, fresh = routed.answer, fresh_answer(routed.answer)
        running = {part.engine: part.part for part in found if part.finish_reason is None}
        held = [piece for part in found for piece in part.pieces()]
        ended = next((part for part in found if part.finish_reason in ("stop", "length")), None)
        if not answer.resume(found[0].attempt, running, held) and ended is not None:
            for name in running:
                self._cancel_part(name, key, found[0].attempt)
            routed.answer = fresh
            return False
        del self.requests[routed.id]
        routed.id = key
        self.requests[key] = routed
        self.counters["resumed"] += 1
        routed.waiting = ""
        for token in answer.tokens:
            self._emit(routed, token)
        whole = ended.finish_reason if ended is not None else answer.complete()
        if whole is not None:
            routed.reports += [part.report for part in found if part.report is not None]
            self._end(routed, whole, None)
        return True

    def _cancelled(self, client: str) -> None:
        """A client wants its answer no more; the last one that waits for it ends the request."""
        routed = self._of_client.get(client)
        if routed is None:
            return
        if len(routed.clients) > 1:
            del self._of_client[client]
            tell(routed.clients.pop(client), TokenEvent(None, "cancelled"))
            return
        self._guarded(partial(self._cancel_parts, routed, tuple(routed.answer.parts)))
        self._end(routed, "cancelled", None)

    def _emit(self, routed: Routed, token: int) -> None:
        if routed.first_token_s is None:
            routed.first_token_s = time.monotonic()
        if len(routed.marks) and routed.marks[-1][0] != "decode":
            routed.mark("decode", time.monotonic())
        routed.tell(TokenEvent(token))

    def _end(self, routed: Routed, reason: FinishReason, error: str | None) -> None:
        """The request's last event, whatever else goes wrong."""
        if self.requests.get(routed.id) is not routed:
            return
        del self.requests[routed.id]
        self._early.pop(routed.id, None)
        for client in routed.clients:
            self._of_client.pop(client, None)
        if routed.asked is not None and self._shared.get(routed.asked) is routed:
            del self._shared[routed.asked]
        self._guarded(partial(self._tell_brain_of_end, routed))
        self.counters[f"ended_{reason}"] += 1
        report: RequestReport | None = None
        try:
            report = self._report_of(routed)
        except Exception as failed:
            self.counters["internal_errors"] += 1
            rare.exception("report", "a request's report could not be made: %r", failed)
        if report is not None and reason in ("stop", "length"):
            self.recent.append(report)
        routed.tell(TokenEvent(None, reason, error, report))
        self._decide_soon()

    def _tell_brain_of_end(self, routed: Routed) -> None:
        if routed.brain_attempt is not None:
            self.brain.ended(routed.id, routed.brain_attempt)
        self.brain.cancel(routed.id)

    def _report_of(self, routed: Routed) -> RequestReport:
        return merged_report(
            routed.reports,
            prompt_tokens=len(routed.request.prompt_tokens),
            generated_tokens=len(routed.answer.tokens),
            ttft_s=None if routed.first_token_s is None else routed.first_token_s - routed.arrival_s,
            total_s=time.monotonic() - routed.arrival_s,
            slo_ttft_s=routed.request.slo_ttft_s,
        )

    def _end_all(self, reason: FinishReason, error: str) -> None:
        for routed in list(self.requests.values()):
            self._end(routed, reason, error)

    # -- decisions ----------------------------------------------------------------------------------------------

    def _decide_soon(self) -> None:
        if not self._deciding and not self._loop.is_closed():
            self._deciding = True
            self._loop.call_soon(self._decide)

    def _decide(self) -> None:
        self._deciding = False
        try:
            if self._accounts is not None:
                self._accounts.deciding()
            decisions = self.brain.decide(time.monotonic())
        except DecisionFailed as error:
            self._decision_failed(error)
            return
        except Exception as error:
            self.counters["internal_errors"] += 1
            self._failing_since_s = self._failing_since_s or time.monotonic()
            rare.exception("decide", "the router could not decide: %r; it tries again", error)
            return
        self._failing_since_s = None
        for decision in decisions:
            routed = self.requests.get(str(decision.request_id))
            if routed is not None:
                self._guarded(partial(self._carry_out, routed, decision), routed)

    def _decision_failed(self, error: DecisionFailed) -> None:
        """That request ends; the others are decided on anew."""
        self.counters["internal_errors"] += 1
        rare.exception("decision", "request %s could not be decided on: %r", error.request_id, error.__cause__)
        routed = self.requests.get(str(error.request_id))
        if routed is not None:
            self._end(routed, "error", str(error))
        self._decide_soon()

    def _carry_out(self, routed: Routed, decision: Decision) -> None:
        if isinstance(decision, Place):
            self._place(routed, decision)
        elif isinstance(decision, Replan):
            self._replan(routed, decision)
        elif isinstance(decision, Revoke):
            self._cancel_parts(routed, decision.engines)
        elif isinstance(decision, GiveUp):
            rare.warning("given up", "request %s is given up (%s): %s", routed.id, decision.reason, routed.waiting)
            self._cancel_parts(routed, tuple(routed.answer.parts))
            self._end(routed, "error", f"given up ({decision.reason}): {routed.waiting}")

    def _place(self, routed: Routed, place: Place) -> None:
        parts: dict[str, Part]
        prefill, decode = self.port.engines.get(place.prefill), self.port.engines.get(place.decode)
        if prefill is None or decode is None:
            self.brain.restart(place.request_id, place.attempt)
            return
        parts = {place.prefill: "mixed"} if prefill is decode else {place.prefill: "prefill", place.decode: "decode"}
        routed.brain_attempt = place.attempt
        attempt = routed.answer.begin(parts)
        routed.waiting, routed.read = "", place.read
        routed.mark("prefill", time.monotonic())
        placed = placed_request(routed, place, attempt, decode if prefill is not decode else None)
        for engine in {prefill.name: prefill, decode.name: decode}.values():
            far = place.decode_tokens if engine is decode else 0
            near = place.hit_tokens - place.recompute_tokens - place.decode_tokens if engine is prefill else 0
            if self._accounts is not None and place.read != "none":
                self._accounts.placed(engine, near + far)
            self.port.send(engine, wire.Place(part_of(placed, parts[engine.name], engine.epoch)))

    def _replan(self, routed: Routed, decision: Replan) -> None:
        for name, part in routed.answer.parts.items():
            engine = self.port.engines.get(name)
            if part == "prefill" and engine is not None:
                self.port.send(engine, wire.Replan(engine.epoch, routed.id, routed.answer.attempt, decision.side))

    def _cancel_parts(self, routed: Routed, engines: Sequence[str]) -> None:
        for name in engines:
            self._cancel_part(name, routed.id, routed.answer.attempt)

    def _cancel_part(self, name: str, request_id: str, attempt: int) -> None:
        engine = self.port.engines.get(name)
        if engine is not None:
            self.port.send(engine, wire.Cancel(engine.epoch, request_id, attempt))

    # -- what engines say (the port's listener) -----------------------------------------------------------------

    def engine_fits(self, card: wire.EngineCard) -> str | None:
        """See `port.Listener`."""
        if card.role == "decode" and not card.relay_address:
            return "a decode engine without the address of its relay"
        if card.vocab_size < 1 or card.block_tokens < 1 or card.block_bytes < 1 or card.max_context_tokens < 2:
            return "vocab_size, block_tokens, block_bytes or max_context_tokens is too small"
        mine = self.settings.vocabulary
        if mine and card.vocabulary and mine != card.vocabulary:
            return (
                "its checkpoint's tokenizer has another vocabulary than that of the router's --model; allowed: the same"
            )
        others = [engine.card for engine in self.port.engines.values() if engine.name != card.name]
        if not others:
            return None
        for what in ("model", "block_tokens", "block_bytes", "vocab_size", "eos_token_ids"):
            mine, theirs = getattr(card, what), getattr(others[0], what)
            if mine != theirs:
                return f"its {what} is {mine!r}; {others[0].name} and the others have {theirs!r}"
        return None

    def engine_joined(self, engine: Engine, held: Sequence[wire.Held]) -> list[tuple[str, int]]:
        """See `port.Listener`. A request that is placed meanwhile is not kept."""
        self._learn(engine.card)
        assert self._accounts is not None
        self._accounts.joined(engine, list(self.port.engines.values()))
        self._usable_s = time.monotonic()
        wanted = [one for one in held if one.label and one.request_id not in self.requests]
        kept = self._orphans.add(engine.name, wanted, time.monotonic())
        if len(kept) < len(wanted):
            self.counters["orphans_dropped"] += len(wanted) - len(kept)
            rare.warning("orphans", "engine %s: %d parts of requests are not kept: too many wait to be asked for again",
                         engine.name, len(wanted) - len(kept))  # fmt: skip
        return kept

    def _learn(self, card: wire.EngineCard) -> None:
        """What the cluster serves follows from its engines."""
        if self.model != card.model or self._seen is None:
            self.model = card.model
            self._seen = SeenPrefixes(card.block_tokens)
        if self._accounts is None:
            self._accounts = EngineAccounts(self.brain)
        self.eos_token_ids = frozenset(card.eos_token_ids)
        cards = [engine.card for engine in self.port.engines.values()]
        self.max_context_tokens = min(one.max_context_tokens for one in cards)
        self.vocab_size = card.vocab_size

    def engine_left(self, engine: Engine, why: str) -> None:
        """See `port.Listener`."""
        self.counters["engines_lost"] += 1
        if self._accounts is not None:
            self._accounts.left(engine, list(self.port.engines.values()), time.monotonic())
        self._orphans.engine_left(engine.name)
        for routed in list(self.requests.values()):
            if engine.name in routed.answer.parts:
                self._guarded(partial(self._engine_lost, routed, engine.name, why), routed)
        self._decide_soon()

    def _engine_lost(self, routed: Routed, name: str, why: str) -> None:
        self._follow(routed, routed.answer.engine_lost(name, why), told_brain=True)

    def engine_reported(self, engine: Engine) -> None:
        """See `port.Listener`."""
        if self._accounts is not None:
            self._accounts.reported(engine, list(self.port.engines.values()), time.monotonic())
        self._decide_soon()

    def engine_events(self, engine: Engine, events: Sequence[wire.Event]) -> None:
        """See `port.Listener`."""
        for event in events:
            routed = self.requests.get(event.request_id)
            if routed is None:
                if not self._orphans.event(engine.name, event):
                    self.counters["stale_events"] += 1
                continue
            self._guarded(partial(self._event, routed, engine, event), routed)

    def _event(self, routed: Routed, engine: Engine, event: wire.Event) -> None:
        answer = routed.answer
        if event.attempt != answer.attempt or engine.name not in answer.parts:
            self.counters["stale_events"] += 1
            return
        if event.tokens:
            self._follow(routed, answer.add(engine.name, event.attempt, event.index, event.tokens))
        if event.finish_reason is not None:
            self._part_ended(routed, engine, event)

    def _part_ended(self, routed: Routed, engine: Engine, event: wire.Event) -> None:
        answer = routed.answer
        if engine.name not in answer.parts:
            return
        part = answer.parts[engine.name]
        if event.report is not None:
            fault = wire.report_fault(event.report)
            if fault is None:
                routed.reports.append(event.report)
            else:
                self.counters["reports_dropped"] += 1
                rare.warning("report fault", "a report of engine %s is not counted: %s", engine.name, fault)
        if part == "prefill" and routed.brain_attempt is not None:
            self.brain.prefilled(routed.id, routed.brain_attempt)
        if self._seen is not None and event.finish_reason in ("handed_over", "stop", "length"):
            self._seen.add(routed.request.prompt_tokens, routed.request.tenant)
        assert event.finish_reason is not None
        self._follow(routed, answer.part_ended(engine.name, event.attempt, event.finish_reason, event.error))

    def _follow(self, routed: Routed, outcome: Outcome, told_brain: bool = False) -> None:
        """Carry out what follows an event of one request."""
        for token in outcome.tokens:
            self._emit(routed, token)
        self._cancel_parts(routed, outcome.cancel)
        if outcome.end is not None:
            self._end(routed, outcome.end, outcome.error)
        elif outcome.restart is not None:
            self.counters["restarts"] += 1
            log.info("request %s begins again: %s", routed.id, outcome.restart)
            routed.waiting = outcome.restart
            routed.mark("wait_router", time.monotonic())
            attempt, routed.brain_attempt = routed.brain_attempt, None
            if attempt is None:  # it was adopted: the brain does not know it yet
                self._queue(routed)
            elif not told_brain:
                self.brain.restart(routed.id, attempt)
            self._decide_soon()


def _check_names(request: GenerationRequest) -> None:
    """Names that engines could not be told of are refused here, not on the way. Raises InvalidRequest."""
    for what, name, most in (
        ("tenant (cache_salt)", request.tenant, TENANT_CHARACTERS_MAX),
        ("session", request.session or "", TENANT_CHARACTERS_MAX),
        ("resume_label", request.resume_label, NAME_CHARACTERS_MAX),
    ):
        if len(name) > most:
            raise InvalidRequest(f"{what} has {len(name)} characters; {most} are allowed")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise InvalidRequest(f"{what} is not valid Unicode text") from None
