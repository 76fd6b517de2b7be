"""The placer: the process of a router with front processes that knows all engines and decides who serves a request.

It has the cluster port, the scheduler core and the accounts of engines, and no prompt, no token and no HTTP: those are
the fronts', which say of a request what placing needs (`front_wire`), and talk to the engines themselves.

PLACER-1  Statement: A request of a front is known to the scheduler core from its Submit until its End, or the end of
          that front; so what a front had on engines is given back when it dies.
Verification: tests/cluster/router/fronts/test_fronts.py.

Threading: as `router`. `attach` and the properties may be used from any thread.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar, cast

from penstock.cluster import wire
from penstock.cluster.router.decision_loop import DecisionLoop
from penstock.cluster.router.dispatch import read_tokens_of
from penstock.cluster.router.engine_accounts import EngineAccounts
from penstock.cluster.router.engine_fit import can_serve, misfit
from penstock.cluster.router.engine_registry import EngineRegistry, RegisteredEngine
from penstock.cluster.router.fronts import wire as front_wire
from penstock.cluster.router.fronts.gathering import ConnectedFront, FrontGathering
from penstock.cluster.router.fronts.wire import FrontChannel
from penstock.cluster.router.routed_request import RouterSettings
from penstock.cluster.router.router_loop import RouterLoop
from penstock.cluster.wire_types import clip
from penstock.core.cluster.decisions import Decision, GiveUp, Place, Replan, Revoke, TooManyRequests
from penstock.core.cluster.inter_engine import InterEngineScheduler
from penstock.pool.net.secret import Secret
from penstock.pool.net.tls import PeerTls
from penstock.process.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

SILENT_S = 20.0  # a front that says nothing for so long hangs

T = TypeVar("T")
_Id = tuple[int, int]  # (front connection, serial number)


class Placer:
    """Runs from construction to `close`."""

    def __init__(
        self,
        sock: socket.socket,
        secret: Secret | None,
        settings: RouterSettings,
        tls: PeerTls | None = None,
        *,
        fronts: int,
    ) -> None:
        """`sock` as for `ClusterEngine`; `fronts`: how many processes will be attached."""
        self.settings = settings
        self.counters: Counter[str] = Counter()
        self.start_s = time.monotonic()
        self.on_failed: Callable[[], None] = lambda: None
        self.record_of: Callable[[front_wire.Kind], bytes] = lambda kind: b""
        self.on_silent: Callable[[int], None] = lambda slot: None
        self.port = EngineRegistry(self, sock, secret, settings.lease_s, tls, fronts, self._pass_link)
        self.scheduler = InterEngineScheduler(settings.scheduler)
        self._accounts = EngineAccounts(self.scheduler)
        self._by_slot: dict[int, ConnectedFront] = {}
        self._fronts: dict[int, ConnectedFront] = {}  # by number
        self._numbers: dict[str, int] = {}  # of registered engines, by name
        self._serial = 0  # of fronts and engines
        self._gathering = FrontGathering(self._fronts, lambda kind: self.record_of(kind))
        self._open = 0
        self._ending = False  # the fronts were told to end
        self._failing = ""
        self._attaching: set[asyncio.Future[None]] = set()
        self._loop = RouterLoop(self.counters, (self._tick,), self._end_all, failed=lambda: self.on_failed())
        self._decisions = DecisionLoop(self.scheduler, self.counters, self._loop.soon, self._execute, self._undecidable)
        self._loop.start(self.port.start)

    # -- the process that has it ----------------------------------------------------------------------------------

    @property
    def failure(self) -> str | None:
        """The internal error after which it stopped; None while it serves, and after `close`."""
        return self._loop.failure

    @property
    def ready(self) -> set[int]:
        """The slots of fronts that serve clients."""
        return {slot for slot, front in list(self._by_slot.items()) if front.ready}

    def healthy(self) -> tuple[bool, str]:
        """Whether registered engines can serve a request."""
        if self._loop.refusal or not self._loop.alive:
            return False, self._loop.refusal or "the router's thread ended"
        failing = self._decisions.failing
        return (False, failing) if failing else can_serve(list(self.port.engines.values()), sidecar=False)

    def attach(self, slot: int, channel: socket.socket, links: socket.socket) -> None:
        """A front process was started for this slot; these are this side's ends of its two socket pairs."""

        def attach() -> None:
            task = asyncio.ensure_future(self._attach(slot, channel, links))
            self._attaching.add(task)
            task.add_done_callback(self._attaching.discard)

        self._loop.call(attach)

    def fronts_may_end(self) -> None:
        """From now on a front that ends without open requests does so in order, and is not lost."""
        self._ending = True

    def ask(self, question: Callable[[], T]) -> T:
        """The answer of the placer's thread. Raises TimeoutError."""
        return self._loop.ask(question)

    def close(self, timeout_s: float) -> None:
        """Leave engines and fronts to themselves."""
        self._loop.close(self._close, timeout_s)

    async def _close(self) -> None:
        for front in list(self._fronts.values()):
            front.channel.cut()
        await self.port.close()

    def _end_all(self, reason: str, error: str) -> None:
        """The fronts end their requests when they lose the placer."""

    # -- fronts -------------------------------------------------------------------------------------------------

    async def _attach(self, slot: int, sock: socket.socket, links: socket.socket) -> None:
        known = self._by_slot.get(slot)
        if known is not None:
            self._front_ended(known, "it was started anew")
        self._serial += 1
        number = self._serial
        links.setblocking(False)

        def take(body: bytes) -> None:
            self._loop.guarded(partial(self._take, front, body))

        def ended(why: str) -> None:
            self._loop.guarded(partial(self._front_ended, front, why))

        front = ConnectedFront(number, slot, links, FrontChannel(take, ended), heard_s=time.monotonic())
        await asyncio.get_running_loop().connect_accepted_socket(lambda: front.channel, sock)
        self._fronts[number] = self._by_slot[slot] = front
        front.channel.send(front_wire.State(self._failing))
        for name, engine in self._numbers.items():
            front.channel.send(front_wire.Joined(engine, name))

    def _front_ended(self, front: ConnectedFront, why: str) -> None:
        """Its requests have ended; the engines see that by its connections to them."""
        if self._fronts.pop(front.number, None) is None:
            return
        if self._by_slot.get(front.slot) is front:
            del self._by_slot[front.slot]
        front.links.close()
        front.channel.cut()
        if self._ending and not front.open:
            log.info("front %d has ended", front.slot)
        elif not self._loop.refusal:
            self.counters["fronts_lost"] += 1
            rare.warning("front", "front %d ended with %d open requests: %s", front.slot, len(front.open), why)
        for serial in list(front.open):
            self._end(front, serial, 0)
        self._gathering.ended(front)
        self._decisions.decide_soon()

    def _pass_link(self, slot: int, greeting: bytes, file: int) -> bool:
        front = self._by_slot.get(slot)
        if front is None:
            return False
        try:
            socket.send_fds(front.links, [greeting], [file])
        except OSError as error:  # it does not take them at present, or has ended
            rare.warning("link", "front %d takes no connection: %s", slot, error)
            return False
        return True

    def _take(self, front: ConnectedFront, body: bytes) -> None:
        """A message of a front; what is none ends the connection."""
        try:
            message = front_wire.from_front(body)
        except wire.ProtocolError:
            front.channel.cut()
            raise
        front.heard_s = time.monotonic()
        if isinstance(message, front_wire.OfRequest):
            self.counters["front_request_bytes"] += front_wire.LENGTH.size + len(body)
            failed = partial(self._failed, (front.number, message.serial))
            self._loop.guarded(partial(self._of_request, front, message), failed)
        elif isinstance(message, front_wire.Ready):
            front.ready = True
            self._learn_vocabulary(message.vocabulary)
        elif isinstance(message, front_wire.Gather):
            self._gathering.asked(front, message)
        elif isinstance(message, front_wire.Told):
            self._gathering.told(front, message)

    def _of_request(self, front: ConnectedFront, message: front_wire.OfRequest) -> None:
        request: _Id = (front.number, message.serial)
        if isinstance(message, front_wire.Submit):
            self._submit(front, message)
        elif isinstance(message, front_wire.Prefilled):
            self.scheduler.prefilled(request, message.attempt)
        elif isinstance(message, front_wire.Restart):
            self.scheduler.restart(request, message.attempt)
        else:
            self._end(front, message.serial, message.attempt)
        self._decisions.decide_soon()

    def _failed(self, request: _Id, error: Exception) -> None:
        """A fault in what was done for this request ends it."""
        self._loop.guarded(partial(self.scheduler.cancel, request))
        self._refuse(request, f"internal error: {error!r}")

    def _learn_vocabulary(self, vocabulary: str) -> None:
        """Engines with another vocabulary than the fronts' tokenizer leave, and are refused from now on."""
        if vocabulary == self.settings.vocabulary:
            return
        self.settings = replace(self.settings, vocabulary=vocabulary)
        for engine in list(self.port.engines.values()):
            why = misfit(engine.card, (), vocabulary)
            if why is not None:
                self.port.lose(engine.name, why)

    def _submit(self, front: ConnectedFront, message: front_wire.Submit) -> None:
        serial, now = message.serial, time.monotonic()
        if self._open >= self.settings.max_open:
            most = f"{self.settings.max_open} requests are open; that is the limit"
            self._answer(front, front_wire.Refused(serial, "cancelled", most))
            return
        sizes = message.prompt_tokens, message.hit_tokens, message.answer_tokens
        try:
            self.scheduler.submit((front.number, serial), *sizes, now)
        except (TooManyRequests, ValueError) as error:
            self._answer(front, front_wire.Refused(serial, "cancelled", clip(str(error))))
            return
        front.open[serial] = message.answer_tokens > 1
        self._open += 1

    def _end(self, front: ConnectedFront, serial: int, attempt: int) -> None:
        if front.open.pop(serial, None) is None:
            return
        self._open -= 1
        request: _Id = (front.number, serial)
        if attempt:
            self.scheduler.ended(request, attempt)
        self.scheduler.cancel(request)

    # -- decisions ----------------------------------------------------------------------------------------------

    def _execute(self, decision: Decision) -> None:
        request = cast(_Id, decision.request_id)
        self._loop.guarded(partial(self._pass_on, request, decision), partial(self._failed, request))

    def _pass_on(self, request: _Id, decision: Decision) -> None:
        """Say it to the front whose request it is, unless either has ended."""
        number, serial = request
        front = self._fronts.get(number)
        if front is None or serial not in front.open:
            return
        if isinstance(decision, Place):
            self._answer(front, self._placed(front, serial, decision))
        elif isinstance(decision, Replan):
            self._answer(front, front_wire.Replanned(serial, decision.attempt, decision.side))
        elif isinstance(decision, Revoke):
            self._answer(front, front_wire.Revoked(serial, decision.attempt))
        elif isinstance(decision, GiveUp):
            rare.warning("given up", "a request of front %d is given up: %s", front.slot, decision.reason)
            self._refuse(request, f"given up ({decision.reason})")

    def _placed(self, front: ConnectedFront, serial: int, place: Place) -> front_wire.Placed:
        numbers: list[int] = []
        for name, is_there in ((place.prefill, True), (place.decode, front.open[serial])):
            engine = self.port.engines.get(name)
            if engine is None or not is_there or place.read == "none" or (numbers and place.decode == place.prefill):
                numbers.append(0)
            else:
                numbers.append(self._accounts.placed(engine, read_tokens_of(place, name)))
        return front_wire.Placed(
            serial, place.attempt, self._numbers.get(place.prefill, 0), self._numbers.get(place.decode, 0), place.read,
            place.decode_tokens, place.recompute_tokens, *numbers,
        )  # fmt: skip

    def _answer(self, front: ConnectedFront, message: front_wire.FromPlacer) -> None:
        """Say something about a request to its front."""
        self.counters["front_request_bytes"] += front.channel.send(message)

    def _refuse(self, request: _Id, error: str) -> None:
        """End a request that the scheduler core does not know any more."""
        number, serial = request
        front = self._fronts.get(number)
        if front is not None:
            self._open -= front.open.pop(serial, None) is not None
            self._answer(front, front_wire.Refused(serial, "error", clip(error)))

    def _undecidable(self, request_id: Hashable, error: str) -> None:
        self._refuse(cast(_Id, request_id), error)

    # -- from engines (the port's listener) -----------------------------------------------------------------

    def engine_fits(self, card: wire.EngineCard) -> str | None:
        """See `engine_registry.Listener`."""
        if not card.links_to_fronts:
            return "its version knows no router with fronts; allowed: a router without (--fronts 1), or a newer engine"
        others = [engine.card for engine in self.port.engines.values() if engine.name != card.name]
        return misfit(card, others, self.settings.vocabulary)

    def engine_joined(self, engine: RegisteredEngine, held: Sequence[wire.Held]) -> list[tuple[str, int]]:
        """See `engine_registry.Listener`. It goes on with nothing: its parts are a matter of the fronts."""
        self._accounts.joined(engine)
        self._serial += 1
        self._numbers[engine.name] = self._serial
        self._say(front_wire.Joined(self._serial, engine.name))
        return []

    def engine_left(self, engine: RegisteredEngine, why: str) -> None:
        """See `engine_registry.Listener`."""
        self.counters["engines_lost"] += 1
        self._accounts.left(engine, time.monotonic())
        self._say(front_wire.Left(self._numbers.pop(engine.name, 0), clip(why)))
        self._decisions.decide_soon()

    def engine_reported(self, engine: RegisteredEngine) -> None:
        """See `engine_registry.Listener`."""
        self._accounts.reported(engine, time.monotonic())
        self._decisions.reported()

    def engine_events(self, engine: RegisteredEngine, events: Sequence[wire.Event]) -> int:
        """See `engine_registry.Listener`. Engines send the events of requests to fronts."""
        self.counters["stale_events"] += len(events)
        return 0

    def _say(self, message: front_wire.FromPlacer) -> None:
        for front in self._fronts.values():
            front.channel.send(message)

    # -- timers, pages --------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        now = time.monotonic()
        self._decisions.decide_soon()
        failing = self._decisions.failing or ""
        if bool(failing) != bool(self._failing):
            self._failing = failing
            self._say(front_wire.State(failing))
        self._gathering.give_up_late(now)
        for front in list(self._fronts.values()):
            if front.ready and now - front.heard_s > SILENT_S:
                log.error("front %d hangs: it has said nothing for %.0f s", front.slot, now - front.heard_s)
                self.on_silent(front.slot)
                self._front_ended(front, "it hangs")

    @property
    def fronts(self) -> int:
        """Front processes that are connected."""
        return len(self._fronts)
