"""The router: many engines with the interface of one. It owns the inter-engine core and executes its decisions.

Threading: public methods may be called from any thread. Everything else, the cluster port included, runs on one event
loop in a thread of its own; `on_event` is called from it.

Requests have keys made by the router, unique also across restarts of it. A client's name for its request is only a
label: together with the whole content of the request it finds parts of the answer that engines still have, or the
answer for which another connection already waits (`RoutedRequest.shared`). A label never ends a request.

A fault ends only the request in which it occurred (`_guarded`); one that ends the thread ends every request with its
error, and then the process (`on_failed`).
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeVar

from msgspec import Raw

from penstock.cluster import wire
from penstock.cluster.messages import asked_digest
from penstock.cluster.router.decision_loop import DecisionLoop
from penstock.cluster.router.dispatch import Dispatch, read_tokens_of
from penstock.cluster.router.engine_accounts import EngineAccounts
from penstock.cluster.router.engine_fit import can_serve, misfit
from penstock.cluster.router.engine_registry import EngineRegistry, RegisteredEngine
from penstock.cluster.router.open_requests import OpenRequests
from penstock.cluster.router.prefix_hashes import PrefixHashes
from penstock.cluster.router.routed_request import RoutedRequest, RouterSettings, check_names, fresh_answer
from penstock.cluster.router.router_loop import RouterLoop
from penstock.cluster.router.router_stats import router_stats
from penstock.cluster.router.unclaimed_parts import Asked, UnclaimedParts
from penstock.core.cluster.answer import Answer, Outcome
from penstock.core.cluster.decisions import Decision, GiveUp, Place, Replan, Revoke, TooManyRequests
from penstock.core.cluster.inter_engine import InterEngineScheduler
from penstock.core.cluster.seen_prefixes import PrefixKeys, SeenPrefixes
from penstock.core.operations import FinishReason
from penstock.core.packed_tokens import TOKEN_BYTES, pack_tokens
from penstock.engine.api import (
    EngineStats,
    GenerationRequest,
    InvalidRequest,
    OnEvent,
    Overloaded,
    RequestReport,
    TokenEvent,
    Unsupported,
    check_request,
    tell,
)
from penstock.pool.net.secret import Secret
from penstock.pool.net.tls import PeerTls
from penstock.process.guarded_thread import GuardedWorker
from penstock.process.rate_limited_log import RateLimitedLog

__all__ = ["ClusterEngine", "RequestRouter", "RouterSettings"]

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

RECENT_MAX = 256
KEYS_INLINE_TOKENS = 131_072  # up to this length keys are computed on the router's loop: about 0.05 ms
KEYS_WAITING_MAX = 1024  # prompts that wait for the thread that computes keys

T = TypeVar("T")


class RequestScheduler(Protocol):
    """Places requests, and is told what became of them: the scheduler core, or a connection to the process that has it.
    See `InterEngineScheduler`."""

    def submit(
        self, request_id: str, prompt_tokens: int, hit_tokens: int, answer_tokens: int, now: float, prefill: str | None
    ) -> None:
        """A request arrived. Raises TooManyRequests or ValueError."""

    def prefilled(self, request_id: str, attempt: int) -> None:
        """Its prompt is computed."""

    def restart(self, request_id: str, attempt: int) -> None:
        """The attempt failed through no fault of the request."""

    def ended(self, request_id: str, attempt: int) -> None:
        """It has its whole answer."""

    def cancel(self, request_id: str) -> None:
        """It has ended, with its answer or without."""


class RequestRouter:
    """Open requests and their answers, over the engines that register on `port`. Contract: `engine.api.EngineAPI`.

    Who decides where they are served is left to subclasses: they execute decisions by `carry_out`."""

    scheduler: RequestScheduler
    port: EngineRegistry

    def __init__(self, settings: RouterSettings) -> None:
        """A subclass sets `scheduler` and `port`, then calls `_start`."""
        self.settings = settings
        self.max_context_tokens = 0
        self.vocab_size = 0  # 0 until the first engine has registered
        self.eos_token_ids: frozenset[int] = frozenset()
        self.model: str | None = None
        self.kind = ""  # of the engines
        self.sampling_defaults: Mapping[str, float] = {}  # of vLLM engines: what a client gets who gives nothing
        self.parses_chats = False
        self.counters: Counter[str] = Counter()
        self.recent: deque[RequestReport] = deque(maxlen=RECENT_MAX)
        self.start_s = time.monotonic()
        self.on_failed: Callable[[], None] = lambda: None
        self._open = OpenRequests()
        self.requests = self._open.by_key  # by the router's keys
        self._serial = 0
        self._seen: SeenPrefixes | None = None
        self._hashes: PrefixHashes | None = None  # with `_seen`
        self._key_maker = GuardedWorker("penstock-prompt-keys", KEYS_WAITING_MAX)
        self._unclaimed = UnclaimedParts(settings.claim_s)
        # Unique across restarts: an engine may still serve an attempt of the previous router.
        self._attempt_base = int.from_bytes(os.urandom(4)) << 16
        self._early: dict[str, RoutedRequest] = {}  # wait for engines that may hold their parts
        self._usable_s = time.monotonic()  # last time when engines could serve
        due = (self._begin_early, self._cancel_unclaimed, self._give_up_without_engines, self._tick)
        self._loop = RouterLoop(self.counters, due, self._end_all, failed=lambda: self.on_failed())

    def _start(self, numbered: Callable[[RegisteredEngine, Place], int]) -> None:
        """Begin to serve; `numbered` as for `Dispatch`."""
        self._dispatch = Dispatch(self.port, numbered)
        self._loop.start(self._begin_loop)

    async def _begin_loop(self) -> None:
        """Called on the loop first."""
        await self.port.start()

    async def _end_loop(self) -> None:
        """Called on the loop at last, when all requests have ended."""
        await self.port.close()

    # -- for subclasses -----------------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Called every TICK_S."""

    def _decide_soon(self) -> None:
        """Something happened after which requests may be placed."""

    def _failing(self) -> str | None:
        """One line, while nothing can be decided; any thread may ask."""
        return None

    def _known_prefixes(self, card: wire.EngineCard) -> tuple[SeenPrefixes, PrefixHashes]:
        """For engines of this card's model."""
        return SeenPrefixes(card.block_tokens), PrefixHashes(card.block_tokens)

    # -- callers ------------------------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> None:
        """See EngineAPI. A request with a `resume_label` that is submitted again, unchanged, gets the same answer from
        its first token on: the answer for which another connection still waits, if it would get the same tokens by
        itself, or the parts that engines hold from the time of the previous router."""
        if self._loop.refusal:
            raise Overloaded(self._loop.refusal, retry_after_s=10.0)
        if not self.vocab_size:
            raise Overloaded(self.healthy()[1], 1.0)
        prompt = check_request(request, self.vocab_size, self.max_context_tokens)
        check_names(request)
        if request.api is not None and self.kind != "vllm":
            raise Unsupported("only vLLM engines answer this", "api")
        if request.sampling.logprobs is not None:
            raise Unsupported("logprobs are not passed on by a router; ask the engine of penstock serve", "logprobs")
        if self._open.of_client(request.request_id) is not None:
            raise InvalidRequest(f"request_id {request.request_id!r} is in use for another request")
        asked: Asked | None = None
        if request.resume_label:
            asked = (request.resume_label, asked_digest(prompt, request.sampling, request.tenant))
        end_tokens = request.sampling.end_tokens(self.eos_token_ids)
        answer = Answer(request.sampling.max_tokens, end_tokens, self._attempt_base)
        routed = RoutedRequest("", request, {request.request_id: on_event}, time.monotonic(), answer, prompt, asked)
        if not self._open.same_answer(routed) and len(self.requests) >= self.settings.max_open:
            raise Overloaded(self._full(), 1.0)
        self._loop.call(partial(self._submitted, routed))

    def _full(self) -> str:
        return f"{self.settings.max_open} requests are open; that is the limit"

    def cancel(self, request_id: str) -> None:
        """See EngineAPI."""
        self._loop.call(partial(self._cancelled, request_id))

    def stats(self) -> EngineStats:
        """See EngineAPI."""
        raise NotImplementedError

    def healthy(self) -> tuple[bool, str]:
        """See EngineAPI: whether registered engines can serve a request."""
        if self._loop.refusal or not self._loop.alive:
            return False, self._loop.refusal or "the router's thread ended"
        failing = self._failing()
        if failing is not None:
            return False, failing
        # Without a vocabulary no request can be checked: the first engine is being registered.
        return can_serve(list(self.port.engines.values()) if self.vocab_size else [], self.settings.sidecar)

    @property
    def failure(self) -> str | None:
        """The internal error after which the router stopped; None while it serves, and after `close`."""
        return self._loop.failure

    def close(self, timeout_s: float) -> None:
        """See EngineAPI. Requests end; engines are not notified, and register with the next router."""
        self._loop.close(self._end_loop, timeout_s)
        self._key_maker.stop()

    def ask(self, question: Callable[[], T]) -> T:
        """The answer of the router's thread. Raises TimeoutError."""
        return self._loop.ask(question)

    def remember(self, prompt_tokens: Sequence[int], tenant: str = "") -> None:
        """Record that the pool holds the KV of these tokens, which a router otherwise learns while it serves; for a
        router that has just started. Without engines nothing is recorded. Raises TimeoutError."""

        seen, hashes = self.ask(lambda: (self._seen, self._hashes))
        if seen is not None and hashes is not None:
            self.ask(partial(seen.add, hashes.of(pack_tokens(prompt_tokens), tenant)))

    # -- timers -------------------------------------------------------------------------------------------------

    def _begin_early(self) -> None:
        """Begin requests that waited for engines to register with their parts."""
        if self._early and time.monotonic() >= self.start_s + self.settings.grace_s:
            early, self._early = self._early, {}
            for routed in early.values():
                self._guarded(partial(self._begin, routed), routed)

    def _cancel_unclaimed(self) -> None:
        for name, request_id, attempt in self._unclaimed.unclaimed(time.monotonic()):
            self.counters["unclaimed"] += 1
            self._dispatch.cancel_part(name, request_id, attempt)

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

    def _guarded(self, function: Callable[[], None], routed: RoutedRequest) -> None:
        """Call it; a fault in it ends this request, and no other one."""
        self._loop.guarded(function, partial(self._fail, routed))

    def _fail(self, routed: RoutedRequest, error: Exception) -> None:
        self._loop.guarded(partial(self._cancel_all_parts, routed))
        self._end(routed, "error", f"internal error: {error!r}")

    def _cancel_all_parts(self, routed: RoutedRequest) -> None:
        self._dispatch.cancel_parts(routed, tuple(routed.answer.parts))

    def _submitted(self, routed: RoutedRequest) -> None:
        (client, on_event), *_ = routed.clients.items()
        if self._loop.refusal or self._open.of_client(client) is not None:
            tell(on_event, TokenEvent(None, "error", self._loop.refusal or f"request_id {client!r} is in use"))
            return
        known = self._open.same_answer(routed)
        if known is not None:
            self._share(known, client, on_event)
            return
        if len(self.requests) >= self.settings.max_open:
            tell(on_event, TokenEvent(None, "cancelled", self._full()))
            return
        self._serial += 1
        routed.id = f"{self.port.router_id}-{self._serial}"
        self._open.add(routed)
        self.counters["requests"] += 1
        routed.mark("wait_router", routed.arrival_s)
        if routed.asked is not None and time.monotonic() < self.start_s + self.settings.grace_s:
            self._early[routed.id] = routed
            routed.waiting = "waits for engines that may hold its answer"
            return
        self._guarded(partial(self._begin, routed), routed)

    def _share(self, known: RoutedRequest, client: str, on_event: OnEvent) -> None:
        """Add a connection with the same request: it gets the whole answer. Clients that wait already stay; a client
        that is gone is cancelled by its own connection."""
        self.counters["shared"] += 1
        self._open.share(known, client, on_event)
        for token in known.answer.tokens:
            tell(on_event, TokenEvent(token))

    def _begin(self, routed: RoutedRequest) -> None:
        """Continue an answer that engines hold from the time of the previous router; else queue the request."""
        if self.requests.get(routed.id) is not routed:
            return
        if routed.asked is not None and self._adopt(routed, routed.asked):
            return
        self._queue(routed)

    def _with_keys(self, routed: RoutedRequest, then: Callable[[SeenPrefixes, PrefixKeys], None]) -> None:
        """Call `then` with the keys of the request's prompt, which are computed once: for a long prompt on a thread, so
        that the loop, and shorter requests that arrived later, go on meanwhile."""
        seen, hashes, tenant = self._seen, self._hashes, routed.request.tenant
        assert seen is not None and hashes is not None, "no engine has registered, and a request was checked against it"

        def made(keys: PrefixKeys) -> None:
            routed.keys = keys
            self._guarded(partial(then, seen, keys), routed)

        def make() -> None:
            keys = hashes.of(routed.prompt, tenant)
            self._loop.call(partial(made, keys))

        def failed(error: Exception) -> None:
            self._loop.call(partial(self._fail, routed, error))

        if routed.keys is not None:
            then(seen, routed.keys)
        elif len(routed.prompt) <= TOKEN_BYTES * KEYS_INLINE_TOKENS or not self._key_maker.put(make, failed):
            keys = routed.keys = hashes.of(routed.prompt, tenant)
            then(seen, keys)

    def _queue(self, routed: RoutedRequest) -> None:
        routed.waiting = "its turn"
        self._with_keys(routed, partial(self._give_to_scheduler, routed))

    def _give_to_scheduler(self, routed: RoutedRequest, seen: SeenPrefixes, keys: PrefixKeys) -> None:
        if self.requests.get(routed.id) is not routed:
            return  # it ended while its keys were computed
        request = routed.request
        routed.hit_tokens = seen.hit_tokens(keys)
        try:
            self.scheduler.submit(
                routed.id,
                len(request.prompt_tokens),
                routed.hit_tokens,
                request.sampling.max_tokens,
                time.monotonic(),
                request.prefill,
            )
        except (TooManyRequests, ValueError) as error:
            self._end(routed, "cancelled", str(error))
            return
        self._decide_soon()

    def _adopt(self, routed: RoutedRequest, asked: Asked) -> bool:
        """Continue a request that engines hold from its first token on: send the tokens that they have, and use their
        key for it. Returns whether there was one."""
        claimed = self._unclaimed.claim(asked)
        if claimed is None:
            return False
        key, found, rest = claimed
        for name, request_id, attempt in rest:
            self._dispatch.cancel_part(name, request_id, attempt)
        answer, fresh = routed.answer, fresh_answer(routed.answer)
        running = {part.engine: part.part for part in found if part.finish_reason is None}
        held = [piece for part in found for piece in part.pieces()]
        ended = next((part for part in found if part.finish_reason in ("stop", "length")), None)
        if not answer.resume(found[0].attempt, running, held) and ended is not None:
            for name in running:
                self._dispatch.cancel_part(name, key, found[0].attempt)
            routed.answer = fresh
            return False
        self._open.change_key(routed, key)
        self.counters["resumed"] += 1
        routed.waiting = ""
        for token in answer.tokens:
            self._emit(routed, TokenEvent(token))
        whole = ended.finish_reason if ended is not None else answer.complete()
        if whole is not None:
            for part in found:
                self._note_report(routed, part.engine, part.report)
            self._end(routed, whole, None)
        return True

    def _cancelled(self, client: str) -> None:
        """Remove a client that has cancelled; without further clients the request ends."""
        routed = self._open.of_client(client)
        if routed is None:
            return
        if len(routed.clients) > 1:
            tell(self._open.drop_client(client), TokenEvent(None, "cancelled"))
            return
        self._loop.guarded(partial(self._cancel_all_parts, routed))
        self._end(routed, "cancelled", None)

    def _emit(self, routed: RoutedRequest, event: TokenEvent) -> None:
        if routed.first_token_s is None:
            routed.first_token_s = time.monotonic()
        if len(routed.marks) and routed.marks[-1][0] != "decode":
            routed.mark("decode", time.monotonic())
        routed.tell(event)

    def _end(self, routed: RoutedRequest, reason: FinishReason, error: str | None) -> None:
        """Send the request's last event, also when other steps fail."""
        if not self._open.remove(routed):
            return
        self._early.pop(routed.id, None)
        self._loop.guarded(partial(self._end_in_scheduler, routed))
        self.counters[f"ended_{reason}"] += 1
        report: RequestReport | None = None
        try:
            report = routed.report(time.monotonic())
        except Exception as failed:  # noqa: BLE001 (the request is answered without a report)
            self.counters["internal_errors"] += 1
            rare.exception("report", "a request's report could not be made: %r", failed)
        if report is not None and reason in ("stop", "length"):
            self.recent.append(report)
        routed.tell(TokenEvent(None, reason, error, report))
        self._decide_soon()

    def _end_in_scheduler(self, routed: RoutedRequest) -> None:
        if routed.scheduler_attempt is not None:
            self.scheduler.ended(routed.id, routed.scheduler_attempt)
        self.scheduler.cancel(routed.id)

    def _end_all(self, reason: FinishReason, error: str) -> None:
        for routed in list(self.requests.values()):
            self._end(routed, reason, error)

    # -- decisions ----------------------------------------------------------------------------------------------

    def carry_out(self, decision: Decision) -> None:
        """Execute a decision, unless the request has ended; a fault ends the request."""
        routed = self.requests.get(str(decision.request_id))
        if routed is not None:
            self._guarded(partial(self._carry_out, routed, decision), routed)

    def _undecidable(self, request_id: Hashable, error: str) -> None:
        """End the request whose decision failed."""
        routed = self.requests.get(str(request_id))
        if routed is not None:
            self._end(routed, "error", error)

    def _carry_out(self, routed: RoutedRequest, decision: Decision) -> None:
        if isinstance(decision, Place):
            if not self._dispatch.place(routed, decision):
                self.scheduler.restart(routed.id, decision.attempt)
        elif isinstance(decision, Replan):
            self._dispatch.replan(routed, decision)
        elif isinstance(decision, Revoke):
            self._dispatch.cancel_parts(routed, decision.engines)
        elif isinstance(decision, GiveUp):
            rare.warning("given up", "request %s is given up (%s): %s", routed.id, decision.reason, routed.waiting)
            self._cancel_all_parts(routed)
            self._end(routed, "error", f"given up ({decision.reason}): {routed.waiting}")

    # -- from engines (the port's listener) -----------------------------------------------------------------

    def engine_fits(self, card: wire.EngineCard) -> str | None:
        """See `engine_registry.Listener`."""
        others = [engine.card for engine in self.port.engines.values() if engine.name != card.name]
        return misfit(card, others, self.settings.vocabulary)

    def engine_joined(self, engine: RegisteredEngine, held: Sequence[wire.Held]) -> list[tuple[str, int]]:
        """See `engine_registry.Listener`. Parts of requests that are placed elsewhere by now are refused."""
        self._learn(engine.card)
        self._usable_s = time.monotonic()
        wanted = [one for one in held if one.label and one.request_id not in self.requests]
        kept = self._unclaimed.add(engine.name, wanted, time.monotonic())
        if len(kept) < len(wanted):
            self.counters["orphans_dropped"] += len(wanted) - len(kept)
            rare.warning("orphans", "engine %s: %d parts of requests are dropped: too many are unclaimed",
                         engine.name, len(wanted) - len(kept))  # fmt: skip
        return kept

    def _learn(self, card: wire.EngineCard) -> None:
        """Take model, vocabulary and block size of the cluster from an engine's card."""
        if self.model != card.model or self._seen is None:
            self.model = card.model
            self._seen, self._hashes = self._known_prefixes(card)
        self.eos_token_ids = frozenset(card.eos_token_ids)
        cards = [engine.card for engine in self.port.engines.values()]
        self.max_context_tokens = min(one.max_context_tokens for one in cards)
        self.kind = card.kind
        self.sampling_defaults, self.parses_chats = card.sampling_defaults, card.parses_chats
        self.vocab_size = card.vocab_size  # last: from now on other threads may submit

    def engine_left(self, engine: RegisteredEngine, why: str) -> None:
        """See `engine_registry.Listener`."""
        self._without_engine(engine.name, why, scheduler_knows=True)

    def _without_engine(self, name: str, why: str, scheduler_knows: bool) -> None:
        """Requests of an engine that left begin again. `scheduler_knows`: whoever places them knows that already."""
        self._unclaimed.engine_left(name)
        for routed in list(self.requests.values()):
            if name in routed.answer.parts:
                self._guarded(partial(self._engine_lost, routed, name, why, scheduler_knows), routed)
        self._decide_soon()

    def _engine_lost(self, routed: RoutedRequest, name: str, why: str, scheduler_knows: bool) -> None:
        self._follow(routed, routed.answer.engine_lost(name, why), scheduler_knows)

    def engine_reported(self, engine: RegisteredEngine) -> None:
        """See `engine_registry.Listener`."""

    def engine_events(self, engine: RegisteredEngine, events: Sequence[wire.Event]) -> int:
        """See `engine_registry.Listener`."""
        stale = self.counters["stale_events"]
        for event in events:
            routed = self.requests.get(event.request_id)
            if routed is None:
                if not self._unclaimed.event(engine.name, event):
                    self.counters["stale_events"] += 1
                continue
            self._guarded(partial(self._event, routed, engine, event), routed)
        return len(events) - (self.counters["stale_events"] - stale)

    def _event(self, routed: RoutedRequest, engine: RegisteredEngine, event: wire.Event) -> None:
        answer = routed.answer
        if event.attempt != answer.attempt or engine.name not in answer.parts:
            self.counters["stale_events"] += 1
            return
        tokens = event.tokens[: max(0, answer.max_tokens - event.index)]  # no more than the answer may have
        if tokens and max(tokens) >= engine.card.vocab_size:
            self.counters["events_dropped"] += 1
            why = f"it sent token {max(tokens)}; its vocabulary has {engine.card.vocab_size}"
            rare.warning(f"token {engine.name}", "engine %s: a part of a request ends: %s", engine.name, why)
            self._dispatch.cancel_part(engine.name, routed.id, event.attempt)
            self._follow(routed, answer.part_ended(engine.name, event.attempt, "restart", why))
            return
        if event.data and routed.request.api is not None:
            self._emit(routed, TokenEvent(None, data=event.data))
            routed.data_sent = True
        if tokens:
            self._follow(routed, answer.add(engine.name, event.attempt, event.index, tokens))
        if event.finish_reason is not None:
            self._part_ended(routed, engine, event)

    def _part_ended(self, routed: RoutedRequest, engine: RegisteredEngine, event: wire.Event) -> None:
        answer = routed.answer
        if engine.name not in answer.parts:
            return
        part = answer.parts[engine.name]
        self._note_report(routed, engine.name, event.report)
        if part == "prefill" and routed.scheduler_attempt is not None:
            self.scheduler.prefilled(routed.id, routed.scheduler_attempt)
        if event.finish_reason in ("handed_over", "stop", "length"):
            self._with_keys(routed, lambda seen, keys: seen.add(keys))
        assert event.finish_reason is not None
        if routed.request.api is not None and part != "prefill" and event.finish_reason in ("stop", "length"):
            self._dispatch.cancel_parts(routed, [name for name in answer.parts if name != engine.name])
            self._end(routed, event.finish_reason, None)
            return
        self._follow(routed, answer.part_ended(engine.name, event.attempt, event.finish_reason, event.error))

    def _note_report(self, routed: RoutedRequest, engine: str, packed: Raw) -> None:
        """Count an engine's report of its part; a report that is out of bounds is dropped."""
        try:
            report = wire.report_in(packed)
        except wire.ProtocolError as error:
            self.counters["reports_dropped"] += 1
            rare.warning("report fault", "a report of engine %s is not counted: %s", engine, error)
            return
        if report is not None:
            routed.reports.append(report)

    def _follow(self, routed: RoutedRequest, outcome: Outcome, scheduler_knows: bool = False) -> None:
        """Execute the outcome of an event of one request."""
        for token in outcome.tokens:
            self._emit(routed, TokenEvent(token))
        self._dispatch.cancel_parts(routed, outcome.cancel)
        if outcome.end is not None:
            self._end(routed, outcome.end, outcome.error)
        elif outcome.restart is not None and self.kind == "vllm" and not routed.repeatable:
            error = f"{outcome.restart}; no other engine can continue what was sent of this answer"
            self._end(routed, "error", error)
        elif outcome.restart is not None:
            self.counters["restarts"] += 1
            log.info("request %s begins again: %s", routed.id, outcome.restart)
            routed.waiting = outcome.restart
            routed.mark("wait_router", time.monotonic())
            attempt, routed.scheduler_attempt = routed.scheduler_attempt, None
            if attempt is None:  # continued from a previous router: the scheduler core does not know it yet
                self._queue(routed)
            elif not scheduler_knows:
                self.scheduler.restart(routed.id, attempt)
            self._decide_soon()


class ClusterEngine(RequestRouter):
    """A router of one process: it has the scheduler core, too."""

    scheduler: InterEngineScheduler

    def __init__(
        self, sock: socket.socket, secret: Secret | None, settings: RouterSettings, tls: PeerTls | None = None
    ) -> None:
        """`sock` is bound; the router listens on it from now on, and `close` closes it. `secret` and `tls` as for
        `EngineRegistry`."""
        super().__init__(settings)
        self.port = EngineRegistry(self, sock, secret, settings.lease_s, tls)
        self.scheduler = InterEngineScheduler(settings.scheduler)
        self._accounts = EngineAccounts(self.scheduler)
        self._decisions = DecisionLoop(
            self.scheduler, self.counters, self._loop.soon, self.carry_out, self._undecidable
        )
        self._start(self._numbered)

    def stats(self) -> EngineStats:
        """See EngineAPI."""
        return self.ask(lambda: router_stats(self.requests, self.port, self.scheduler, self.counters))

    def engine_joined(self, engine: RegisteredEngine, held: Sequence[wire.Held]) -> list[tuple[str, int]]:
        """See `engine_registry.Listener`."""
        self._accounts.joined(engine)
        return super().engine_joined(engine, held)

    def engine_left(self, engine: RegisteredEngine, why: str) -> None:
        """See `engine_registry.Listener`."""
        self.counters["engines_lost"] += 1
        self._accounts.left(engine, time.monotonic())
        super().engine_left(engine, why)

    def engine_reported(self, engine: RegisteredEngine) -> None:
        """See `engine_registry.Listener`."""
        self._accounts.reported(engine, time.monotonic())
        self._decisions.reported()

    def _numbered(self, engine: RegisteredEngine, place: Place) -> int:
        return 0 if place.read == "none" else self._accounts.placed(engine, read_tokens_of(place, engine.name))

    def _tick(self) -> None:
        self._decide_soon()

    def _decide_soon(self) -> None:
        self._decisions.decide_soon()

    def _failing(self) -> str | None:
        return self._decisions.failing
