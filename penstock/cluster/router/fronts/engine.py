"""A front process's side of the router: its clients' requests and their answers. The placer decides who serves them.

FRONT-1  Statement: A placement is begun when this front is connected to its engines; until then it waits, LINK_S at
         most, and is then given back to the placer.
FRONT-2  Statement: A loss that front and placer see in different order costs an attempt, never the request: what is
         said of an attempt that is over is ignored.
Verification: tests/cluster/router/fronts/test_fronts.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from penstock.cluster import wire
from penstock.cluster.router.engine_registry import EngineRegistry, RegisteredEngine
from penstock.cluster.router.fronts import wire as front_wire
from penstock.cluster.router.fronts.records import MetricsRecord, added_metrics, packed, unpacked
from penstock.cluster.router.fronts.shared_prefixes import SharedPrefixes
from penstock.cluster.router.fronts.wire import FrontChannel, Kind
from penstock.cluster.router.prefix_hashes import PrefixHashes
from penstock.cluster.router.routed_request import RoutedRequest, RouterSettings
from penstock.cluster.router.router import RequestRouter
from penstock.cluster.router.router_stats import port_counters, request_gauges
from penstock.core.cluster.decisions import Place, Replan
from penstock.core.cluster.seen_prefixes import SeenPrefixes
from penstock.engine.api import EngineStats
from penstock.pool.net.secret import Secret
from penstock.pool.net.tls import PeerTls
from penstock.process.guarded_thread import GuardedWorker
from penstock.process.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

LINK_S = 3.0  # a placement waits so long for the connection to an engine
LINKS_AT_ONCE = 16
GATHER_S = 4.0  # the placer answers within 1.5 s
GATHERINGS_MAX = 16
RECORDS_MAX = 64  # that the placer asks for and that are not made yet


@dataclass(frozen=True)
class FrontSockets:
    """What a front process gets from the placer's: its ends of the socket pairs for messages and for connections of
    engines, and the file of the table of seen prefixes."""

    channel: socket.socket
    links: socket.socket
    prefixes: int


class _RemoteScheduler:
    """The placer's scheduler core, as `RequestScheduler`. On the router's thread."""

    def __init__(self, send: Callable[[front_wire.FromFront], object]) -> None:
        self._send = send
        self._last = 0
        self._serials: dict[str, int] = {}
        self._ids: dict[int, str] = {}

    def id_of(self, serial: int) -> str | None:
        """The request of this number, until it has ended."""
        return self._ids.get(serial)

    def submit(
        self, request_id: str, prompt_tokens: int, hit_tokens: int, answer_tokens: int, now: float, prefill: str | None
    ) -> None:
        """A refusal comes as a message. `prefill` is not supported: such routers have no fronts."""
        assert prefill is None, "a router with fronts was given the name of a prefill engine"
        self._last += 1
        self._serials[request_id], self._ids[self._last] = self._last, request_id
        self._send(front_wire.Submit(self._last, prompt_tokens, hit_tokens, answer_tokens))

    def prefilled(self, request_id: str, attempt: int) -> None:
        """See `RequestScheduler`."""
        if request_id in self._serials:
            self._send(front_wire.Prefilled(self._serials[request_id], attempt))

    def restart(self, request_id: str, attempt: int) -> None:
        """See `RequestScheduler`."""
        if request_id in self._serials:
            self._send(front_wire.Restart(self._serials[request_id], attempt))

    def ended(self, request_id: str, attempt: int) -> None:
        """See `RequestScheduler`; the placer forgets the request."""
        serial = self._serials.pop(request_id, None)
        if serial is not None:
            del self._ids[serial]
            self._send(front_wire.End(serial, attempt))

    def cancel(self, request_id: str) -> None:
        """See `RequestScheduler`."""
        self.ended(request_id, 0)


class FrontEngine(RequestRouter):
    """See the module."""

    def __init__(
        self,
        sockets: FrontSockets,
        prefix_secret: bytes,
        secret: Secret | None,
        settings: RouterSettings,
        tls: PeerTls | None = None,
    ) -> None:
        """`prefix_secret` is common to all fronts; `secret` and `tls` as for `EngineRegistry`."""
        super().__init__(settings)
        self.record_of: Callable[[Kind], bytes] = self._own_record
        self._sockets, self._prefix_secret = sockets, prefix_secret
        self._channel = FrontChannel(self._take, self._placer_lost)
        self._remote = _RemoteScheduler(self._channel.send)
        self.scheduler = self._remote
        self.port = EngineRegistry(self, None, secret, settings.lease_s, tls)
        self._engines: dict[int, str] = {}  # by the placer's number
        self._waiting: dict[str, tuple[front_wire.Placed, float]] = {}  # for connections to engines, until a time
        self._numbers: Mapping[str, int] = {}  # of the placement that is being begun
        self._failing_text = ""
        self._gatherings: dict[int, Future[front_wire.Gathered]] = {}
        self._leaving: asyncio.Future[None] | None = None
        self._adopting: set[asyncio.Future[None]] = set()
        self._asked = 0
        self._records = GuardedWorker("penstock-front-records", RECORDS_MAX)
        self._start(lambda engine, place: self._numbers.get(engine.name, 0))

    # -- for the process ----------------------------------------------------------------------------------------

    def say_ready(self) -> None:
        """Tell the placer that clients are served."""
        self._loop.call(partial(self._say, front_wire.Ready(self.settings.vocabulary)))

    def all_linked(self) -> bool:
        """Whether this front is connected to every engine that is registered with the placer."""
        return self.ask(lambda: all(name in self.port.engines for name in self._engines.values()))

    def stats(self) -> EngineStats:
        """See EngineAPI: of the whole router. Raises TimeoutError."""
        return self.metrics().stats()

    def metrics(self) -> MetricsRecord:
        """Of all processes of the router, those of fronts that have ended included. Raises TimeoutError."""
        own = self.record_of("metrics")
        return added_metrics(unpacked([own, *self.gather("metrics", own)], MetricsRecord))

    def gather(self, kind: Kind, own: bytes) -> list[bytes]:
        """The records of all other processes, the placer's at first. Raises TimeoutError."""
        future: Future[front_wire.Gathered] = Future()
        self._loop.call(partial(self._gather, kind, own, future))
        gathered = future.result(GATHER_S)
        return [gathered.placer, *gathered.fronts]

    def close(self, timeout_s: float) -> None:
        """See EngineAPI. The placer goes on."""
        super().close(timeout_s)
        self._records.stop()

    # -- the placer -----------------------------------------------------------------------------------------------

    async def _begin_loop(self) -> None:
        await super()._begin_loop()
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(lambda: self._channel, self._sockets.channel)
        self._sockets.links.setblocking(False)
        loop.add_reader(self._sockets.links, self._links_came)

    async def _end_loop(self) -> None:
        asyncio.get_running_loop().remove_reader(self._sockets.links)
        await super()._end_loop()
        self._channel.cut()

    def _say(self, message: front_wire.FromFront) -> None:
        self._channel.send(message)

    def _placer_lost(self, why: str) -> None:
        if self._loop.refusal is None:
            self._leaving = asyncio.ensure_future(self._leave(f"the router's placer has ended: {why}"))

    async def _leave(self, why: str) -> None:
        """Nothing can be placed any more: end the connections to engines, then all requests and this process."""
        await self.port.close()
        self._loop.fail(why)

    def _tick(self) -> None:
        self._channel.send(front_wire.Alive())
        now = time.monotonic()
        for request_id, (placed, until_s) in list(self._waiting.items()):
            if now >= until_s:
                del self._waiting[request_id]
                rare.warning(
                    "link", "a placement is given back: there was no connection to its engine for %g s", LINK_S
                )
                self.scheduler.restart(request_id, placed.attempt)

    def _failing(self) -> str | None:
        return self._failing_text or None

    def _take(self, body: bytes) -> None:
        self._loop.guarded(partial(self._message, body))

    def _message(self, body: bytes) -> None:
        try:
            message = front_wire.from_placer(body)
        except wire.ProtocolError:
            self._channel.cut()
            raise
        if isinstance(message, front_wire.Placed | front_wire.Replanned | front_wire.Revoked | front_wire.Refused):
            routed = self.requests.get(self._remote.id_of(message.serial) or "")
            if routed is not None:
                self._guarded(partial(self._decided, routed, message), routed)
        elif isinstance(message, front_wire.Joined):
            self._engines[message.engine] = message.name
        elif isinstance(message, front_wire.Left):
            name = self._engines.pop(message.engine, "")
            self.port.lose(name, message.why)
        elif isinstance(message, front_wire.State):
            self._failing_text = message.failing
        elif isinstance(message, front_wire.Ask):
            self._records.put(partial(self._tell_record, message.number, message.kind))
        else:
            future = self._gatherings.pop(message.number, None)
            if future is not None:
                future.set_result(message)

    def _decided(
        self,
        routed: RoutedRequest,
        message: front_wire.Placed | front_wire.Replanned | front_wire.Revoked | front_wire.Refused,
    ) -> None:
        if isinstance(message, front_wire.Placed):
            self._revoke(routed, routed.scheduler_attempt)
            self._waiting[routed.id] = message, time.monotonic() + LINK_S
            self._place_waiting(routed.id)
        elif isinstance(message, front_wire.Replanned):
            if routed.scheduler_attempt == message.attempt:
                self._dispatch.replan(routed, Replan(routed.id, message.attempt, message.side))
        elif isinstance(message, front_wire.Revoked):
            waiting = self._waiting.get(routed.id)
            if waiting is not None and waiting[0].attempt == message.attempt:
                del self._waiting[routed.id]
            self._revoke(routed, message.attempt)
        else:
            self._cancel_all_parts(routed)
            more = f": {routed.waiting}" if message.reason == "error" and routed.waiting else ""
            self._end(routed, message.reason, message.error + more)

    def _revoke(self, routed: RoutedRequest, attempt: int | None) -> None:
        """The placer has taken this attempt back, which this front may not have noticed."""
        if attempt is not None and routed.scheduler_attempt == attempt and routed.answer.parts:
            why = "an engine of the attempt is lost"
            self._follow(routed, routed.answer.revoked(why), scheduler_knows=True)

    def _place_waiting(self, request_id: str) -> None:
        """Begin a placement, if this front is connected to its engines."""
        placed, _ = self._waiting[request_id]
        routed = self.requests.get(request_id)
        if routed is None:
            del self._waiting[request_id]
            return
        prefill, decode = self._engines.get(placed.prefill), self._engines.get(placed.decode)
        if prefill is None or decode is None:  # it has left meanwhile: another attempt follows
            del self._waiting[request_id]
            self.scheduler.restart(request_id, placed.attempt)
            return
        place = Place(
            request_id, placed.attempt, prefill, decode, placed.read, routed.hit_tokens, placed.decode_tokens,
            placed.recompute_tokens,
        )  # fmt: skip
        self._numbers = {decode: placed.decode_number, prefill: placed.prefill_number}
        if self._dispatch.place(routed, place):
            del self._waiting[request_id]
        else:
            routed.waiting = f"no connection yet to {prefill} or {decode}"

    def _end_in_scheduler(self, routed: RoutedRequest) -> None:
        self._waiting.pop(routed.id, None)
        super()._end_in_scheduler(routed)

    # -- engines --------------------------------------------------------------------------------------------------

    def _links_came(self) -> None:
        """Connections of engines that the placer accepted for this front."""
        for _ in range(LINKS_AT_ONCE):
            try:
                greeting, files, _, _ = socket.recv_fds(self._sockets.links, front_wire.LINK_BYTES_MAX, 1)
            except BlockingIOError:
                return
            except OSError as error:
                log.debug("no connection of an engine: %s", error)
                return
            if not greeting:  # the placer has ended, as its channel says, too
                asyncio.get_running_loop().remove_reader(self._sockets.links)
                return
            for file in files:
                task = asyncio.ensure_future(self._take_link(socket.socket(fileno=file), greeting))
                self._adopting.add(task)
                task.add_done_callback(self._adopting.discard)

    async def _take_link(self, sock: socket.socket, greeting: bytes) -> None:
        sock.setblocking(False)
        try:
            await self.port.adopt(sock, greeting)
        except Exception as error:  # noqa: BLE001 (of one connection, which the engine makes again)
            rare.warning("adopt", "a connection of an engine is lost: %r", error)
            sock.close()

    def engine_joined(self, engine: RegisteredEngine, held: object) -> list[tuple[str, int]]:
        """See `engine_registry.Listener`. It goes on with nothing that it began for another front."""
        super().engine_joined(engine, ())
        self._loop.soon(partial(self._loop.guarded, self._place_all_waiting))
        return []

    def _place_all_waiting(self) -> None:
        for request_id in list(self._waiting):
            routed = self.requests.get(request_id)
            if routed is not None:
                self._guarded(partial(self._place_waiting, request_id), routed)

    def engine_left(self, engine: RegisteredEngine, why: str) -> None:
        """See `engine_registry.Listener`: this front's connection to it has ended."""
        self.counters["links_lost"] += 1
        self._without_engine(engine.name, why, scheduler_knows=False)

    def _known_prefixes(self, card: wire.EngineCard) -> tuple[SeenPrefixes, PrefixHashes]:
        secret = hashlib.blake2b(card.model.encode(), digest_size=32, key=self._prefix_secret).digest()
        seen = SharedPrefixes(card.block_tokens, self._sockets.prefixes)
        return seen, PrefixHashes(card.block_tokens, secret)

    # -- pages ----------------------------------------------------------------------------------------------------

    def metrics_record(self) -> MetricsRecord:
        """This front's requests and counters. Raises TimeoutError."""
        gauges, counted = self.ask(lambda: (request_gauges(self.requests), dict(self.counters)))
        counters = port_counters(self.port) | {name: float(count) for name, count in counted.items()}
        del counters["cluster_connections"]  # the placer has accepted them
        return MetricsRecord(gauges=gauges, counters=counters)

    def _own_record(self, kind: Kind) -> bytes:
        """Without pages."""
        return packed(self.metrics_record()) if kind == "metrics" else b""

    def _tell_record(self, number: int, kind: Kind) -> None:
        record = self.record_of(kind)
        self._loop.call(partial(self._say, front_wire.Told(number, front_wire.bounded(record))))

    def _gather(self, kind: Kind, own: bytes, future: Future[front_wire.Gathered]) -> None:
        while len(self._gatherings) >= GATHERINGS_MAX:
            self._gatherings.pop(next(iter(self._gatherings))).set_exception(TimeoutError("too many ask for this"))
        self._asked += 1
        self._gatherings[self._asked] = future
        self._say(front_wire.Gather(self._asked, kind, front_wire.bounded(own)))


def new_prefix_secret() -> bytes:
    """For all fronts of one start of a router."""
    return os.urandom(32)
