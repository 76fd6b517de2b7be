"""The router: many engines behind the interface of one. It owns the inter-engine brain and carries out its decisions.

Threading: public methods may be called from any thread. Everything else, the cluster port included, runs on one event
loop in a thread of its own; `on_event` is called from it.
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
from dataclasses import replace
from functools import partial
from typing import TypeVar

from penstock.cluster import wire
from penstock.cluster.engine_accounts import EngineAccounts
from penstock.cluster.held import asked_digest
from penstock.cluster.merged_report import merged_report
from penstock.cluster.orphans import Orphans
from penstock.cluster.placed import Part, PlacedRequest, ReadSide
from penstock.cluster.port import ClusterPort, Engine
from penstock.cluster.routed import Routed, RouterSettings, fresh_answer, part_of
from penstock.cluster.router_stats import router_stats
from penstock.core.cluster.answer import Answer, Outcome
from penstock.core.cluster.inter_engine import InterEngineScheduler
from penstock.core.cluster.placing import GiveUp, Place, Replan, Revoke, TooManyRequests
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
from penstock.transport.secret import Secret

__all__ = ["ClusterEngine", "RouterSettings"]

log = logging.getLogger(__name__)

TICK_S = 0.25
ANSWER_TIMEOUT_S = 5.0
RECENT_MAX = 256

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
        self.requests: dict[str, Routed] = {}
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
        self._thread = threading.Thread(target=self._run, name="penstock-router", daemon=True)
        self._thread.start()
        self._started.wait(ANSWER_TIMEOUT_S)

    # -- callers ------------------------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> None:
        """See EngineAPI. A request that is `resumable` and asked for again gets the tokens that it got before."""
        if self._fatal:
            raise Overloaded(self._fatal, retry_after_s=10.0)
        if not self.vocab_size:
            raise Overloaded(self.healthy()[1], 1.0)
        check_request(request, self.vocab_size, self.max_context_tokens)
        digest = asked_digest(request.prompt_tokens, request.sampling, request.tenant)
        known = self.requests.get(request.request_id)
        if known is not None and (not request.resumable or known.digest != digest):
            raise InvalidRequest(f"request_id {request.request_id!r} is in use for another request")
        if len(self.requests) >= self.settings.max_open:
            raise Overloaded(f"{self.settings.max_open} requests are open; that is the limit", 1.0)
        end_tokens = frozenset() if request.sampling.ignore_eos else self.eos_token_ids
        answer = Answer(request.sampling.max_tokens, end_tokens, self._attempt_base)
        routed = Routed(request, on_event, time.monotonic(), answer, digest)
        self._call(partial(self._submitted, routed))

    def cancel(self, request_id: str) -> None:
        """See EngineAPI."""
        self._call(partial(self._cancelled, request_id))

    def stats(self) -> EngineStats:
        """See EngineAPI."""
        return self.ask(lambda: router_stats(self.requests, self.port, self.brain, self.counters))

    def healthy(self) -> tuple[bool, str]:
        """See EngineAPI: whether engines are there that can serve a request."""
        if self._fatal or not self._thread.is_alive():
            return False, self._fatal or "the router's thread ended"
        roles = {engine.card.role for engine in list(self.port.engines.values())}
        if "mixed" in roles or {"prefill", "decode"} <= roles:
            return True, "ok"
        if not roles:
            return False, "no engine has registered"
        return False, f"only {roles.pop()} engines have registered; a request needs both, or a mixed one"

    def close(self, timeout_s: float) -> None:
        """See EngineAPI. Requests end; engines are told nothing, and register with the next router."""
        end_s = time.monotonic() + timeout_s
        if self._thread.is_alive():
            stopped = asyncio.run_coroutine_threadsafe(self._stop(), self._loop)
            try:
                stopped.result(timeout_s)
            except TimeoutError:
                log.error("the router did not stop within %.1f s", timeout_s)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(max(0.1, end_s - time.monotonic()))

    def ask(self, question: Callable[[], T]) -> T:
        """The answer of the router's thread. Raises TimeoutError."""

        async def answer() -> T:
            return question()

        if not self._thread.is_alive():
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
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # closed: everything was ended
            log.debug("the router is closed")

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self.port.start())
            self._ticking = self._loop.create_task(self._tick())
            self._started.set()
            self._loop.run_forever()
        except Exception as error:
            log.exception("the router's thread failed")
            self._fatal = f"internal error: {error!r}"
        finally:
            self._started.set()
            self._fatal = self._fatal or "the router is closed"
            self._end_all("error", self._fatal)
            self._loop.close()

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
            try:
                now = time.monotonic()
                if now >= self.start_s + self.settings.grace_s:
                    early, self._early = self._early, {}
                    for routed in early.values():
                        self._begin(routed)
                for name, request_id, attempt in self._orphans.unclaimed(now):
                    self._cancel_part(name, request_id, attempt)
                self._give_up_without_engines(now)
                self._decide_soon()
            except Exception as error:
                log.exception("the router's clock failed")
                self._fatal = f"internal error: {error!r}"

    def _give_up_without_engines(self, now: float) -> None:
        healthy, why = self.healthy()
        if healthy:
            self._usable_s = now
        elif now - self._usable_s > self.settings.no_engine_s:
            for routed in list(self.requests.values()):
                if not routed.answer.parts and now - routed.arrival_s > self.settings.no_engine_s:
                    self.brain.cancel(routed.id)
                    self._end(routed, "cancelled", f"{why}, for {now - self._usable_s:.0f} s")

    # -- requests -----------------------------------------------------------------------------------------------

    def _submitted(self, routed: Routed) -> None:
        if self._fatal:
            tell(routed.on_event, TokenEvent(None, "error", self._fatal))
            return
        known = self.requests.get(routed.id)
        if known is not None:
            self._take_over(known, routed)
            return
        self.requests[routed.id] = routed
        self.counters["requests"] += 1
        routed.mark("wait_router", routed.arrival_s)
        if routed.request.resumable and time.monotonic() < self.start_s + self.settings.grace_s:
            self._early[routed.id] = routed
            routed.waiting = "engines may register with it"
            return
        self._begin(routed)

    def _take_over(self, known: Routed, routed: Routed) -> None:
        """The same request over another connection of the client: that gets the whole answer from here on."""
        if not routed.request.resumable or known.digest != routed.digest:
            tell(routed.on_event, TokenEvent(None, "error", f"request_id {routed.id!r} is in use"))
            return
        self.counters["taken_over"] += 1
        before, known.on_event = known.on_event, routed.on_event
        tell(before, TokenEvent(None, "cancelled", "the same x-request-id was asked for again"))
        for token in known.answer.tokens:
            tell(known.on_event, TokenEvent(token))

    def _begin(self, routed: Routed) -> None:
        """Go on where engines have it from the router before this one; else hand it to the brain."""
        if self.requests.get(routed.id) is not routed:
            return
        if routed.request.resumable and self._adopt(routed):
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

    def _adopt(self, routed: Routed) -> bool:
        """Whether engines have this request, from its first token on; what they have is sent."""
        found = self._orphans.claim(routed.id, routed.digest)
        for name, request_id, attempt in self._orphans.forget(routed.id):
            self._cancel_part(name, request_id, attempt)
        if found is None:
            return False
        answer, fresh = routed.answer, fresh_answer(routed.answer)
        running = {part.engine: part.part for part in found if part.finish_reason is None}
        held = [piece for part in found for piece in part.pieces()]
        ended = next((part for part in found if part.finish_reason in ("stop", "length")), None)
        if not answer.resume(found[0].attempt, running, held) and ended is not None:
            self._cancel_parts(routed, tuple(running))
            routed.answer = fresh
            return False
        self.counters["resumed"] += 1
        routed.waiting = ""
        for token in answer.tokens:
            self._emit(routed, token)
        whole = ended.finish_reason if ended is not None else answer.complete()
        if whole is not None:
            routed.reports += [part.report for part in found if part.report is not None]
            self._end(routed, whole, None)
        return True

    def _cancelled(self, request_id: str) -> None:
        routed = self.requests.get(request_id)
        if routed is None:
            return
        self._cancel_parts(routed, tuple(routed.answer.parts))
        self.brain.cancel(request_id)
        self._end(routed, "cancelled", None)
        self._decide_soon()

    def _emit(self, routed: Routed, token: int) -> None:
        if routed.first_token_s is None:
            routed.first_token_s = time.monotonic()
        if len(routed.marks) and routed.marks[-1][0] != "decode":
            routed.mark("decode", time.monotonic())
        tell(routed.on_event, TokenEvent(token))

    def _end(self, routed: Routed, reason: FinishReason, error: str | None) -> None:
        """The request's last event."""
        if self.requests.pop(routed.id, None) is None:
            return
        self._early.pop(routed.id, None)
        if routed.brain_attempt is not None:
            self.brain.ended(routed.id, routed.brain_attempt)
        self.brain.cancel(routed.id)
        now = time.monotonic()
        report = merged_report(
            routed.reports,
            prompt_tokens=len(routed.request.prompt_tokens),
            generated_tokens=len(routed.answer.tokens),
            ttft_s=None if routed.first_token_s is None else routed.first_token_s - routed.arrival_s,
            total_s=now - routed.arrival_s,
            slo_ttft_s=routed.request.slo_ttft_s,
        )
        self.counters[f"ended_{reason}"] += 1
        if reason in ("stop", "length"):
            self.recent.append(report)
        tell(routed.on_event, TokenEvent(None, reason, error, report))
        self._decide_soon()

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
        if self._accounts is not None:
            self._accounts.deciding()
        for decision in self.brain.decide(time.monotonic()):
            routed = self.requests.get(str(decision.request_id))
            if isinstance(decision, Place):
                if routed is not None:
                    self._place(routed, decision)
            elif isinstance(decision, Replan):
                if routed is not None:
                    self._replan(routed, decision)
            elif isinstance(decision, Revoke):
                if routed is not None:
                    self._cancel_parts(routed, decision.engines)
            elif isinstance(decision, GiveUp) and routed is not None:
                self._cancel_parts(routed, tuple(routed.answer.parts))
                self._end(routed, "error", f"given up ({decision.reason}): {routed.waiting}")

    def _place(self, routed: Routed, place: Place) -> None:
        parts: dict[str, Part]
        prefill, decode = self.port.engines.get(place.prefill), self.port.engines.get(place.decode)
        if prefill is None or decode is None:
            self.brain.restart(place.request_id, place.attempt)
            return
        parts = {place.prefill: "mixed"} if prefill is decode else {place.prefill: "prefill", place.decode: "decode"}
        request, answer = routed.request, routed.answer
        attempt = answer.begin(parts)
        routed.brain_attempt, routed.waiting, routed.read = place.attempt, "", place.read
        routed.mark("prefill", time.monotonic())
        read: ReadSide = place.read if place.read != "none" else "prefill"
        placed = PlacedRequest(
            request_id=routed.id,
            epoch=0,
            prompt_tokens=request.prompt_tokens + answer.tokens,
            sampling=replace(request.sampling, max_tokens=answer.max_tokens - len(answer.tokens)),
            attempt=attempt,
            first_index=len(answer.tokens),
            waited_s=time.monotonic() - routed.arrival_s,
            slo_ttft_s=request.slo_ttft_s,
            tenant=request.tenant,
            session=request.session,
            decode_engine=decode.name if prefill is not decode else "",
            decode_relay=decode.card.relay_address if prefill is not decode else "",
            read=read,
            decode_share=place.decode_share if read == "split" else float(read == "decode"),
            recompute_tokens=place.recompute_tokens,
            resumable=request.resumable,
        )
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
        wanted = [one for one in held if one.request_id not in self.requests or one.request_id in self._early]
        return self._orphans.add(engine.name, wanted, time.monotonic())

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
                self._follow(routed, routed.answer.engine_lost(engine.name, why), told_brain=True)
        self._decide_soon()

    def engine_reported(self, engine: Engine) -> None:
        """See `port.Listener`."""
        if self._accounts is not None:
            self._accounts.reported(engine, list(self.port.engines.values()), time.monotonic())
        self._decide_soon()

    def engine_events(self, engine: Engine, events: Sequence[wire.Event]) -> None:
        """See `port.Listener`."""
        for event in events:
            routed = self.requests.get(event.request_id)
            if routed is None or event.request_id in self._early:
                self._orphans.event(engine.name, event)
                continue
            answer = routed.answer
            if event.attempt != answer.attempt or engine.name not in answer.parts:
                self.counters["stale_events"] += 1
                continue
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
            routed.reports.append(event.report)
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
