"""The router's cluster port: registers engines, renews their leases, refuses unknown peers and frames of old epochs.

Everything here runs on one event loop. Events are passed to a `Listener`, whose methods run on that loop too; an
exception in one is logged and counted, and ends at most a registration.

An engine's frames are short, and other engines have their turn (`frame_flow`). Messages that advance no request
(heartbeats, and events for which nobody waits) may use only a share of the time, by address
(`pool.net.message_budget`): an engine that sends without end does not delay the others.

A connection must register within HANDSHAKE_S. When STRANGERS_MAX connections have not registered, the oldest one of the
address with the most of them is closed for the next: a peer with the secret needs only a few milliseconds. Engines are
limited separately, also by address (`core.connection_limits`).

A router with front processes accepts the connections for all of them: those whose greeting names a front are passed to
it before anything is answered (`PassLink`). A front's registry takes connections in that way only (`adopt`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from penstock.cluster import wire
from penstock.cluster.messages import EngineReport
from penstock.cluster.router.frame_flow import FrameFlow
from penstock.cluster.wire_types import clip
from penstock.core.cluster.membership import Membership, NameTaken
from penstock.core.connection_limits import ConnectionLimits, ConnectionShares, network_of
from penstock.pool.net.message_budget import MessageBudget
from penstock.pool.net.push_stream import PushStream
from penstock.pool.net.secret import NONCE_BYTES, PROOF_BYTES, Secret, SecretRefused
from penstock.pool.net.tls import PeerTls, TlsError
from penstock.pool.net.tls_streams import Stream, begin_tls
from penstock.process.file_limit import file_limit
from penstock.process.rate_limited_log import RateLimitedLog, kind_of
from penstock.units import format_address

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

ENGINES_MAX = 4096
ENGINES_OF_ADDRESS_MAX = 1024
STRANGERS_MAX = 512  # connections that have not registered
BACKLOG = 1024
ACCEPT_AT_ONCE = 8  # before accepted connections have their turn: a burst would close them unread
RECEIVED_AHEAD_BYTES = 1 << 20  # of a peer that has not registered
REGISTER_S = 0.001  # CPU time of a registration and of its end
UNSENT_BYTES_MAX = 256 << 20  # unsent bytes to one engine; above, the engine counts as lost
BEATS_PER_LEASE = 4

FIRST = (wire.Register, wire.MoreHeld)  # messages of a registration
First = TypeVar("First", wire.Register, wire.MoreHeld)


@dataclass(eq=False, slots=True)
class RegisteredEngine:
    """A registered engine. `epoch` is current as long as the engine is registered."""

    card: wire.EngineCard
    epoch: int
    report: EngineReport
    peer: str
    since_s: float
    stream: Stream
    heard_s: float = 0.0
    placed_seen: int = 0  # Place messages that the report includes

    @property
    def name(self) -> str:
        """The name under which the engine registered."""
        return self.card.name


PassLink = Callable[[int, bytes, int], bool]  # (front, greeting, file) -> whether that front has a copy of the file now


class Listener(Protocol):
    """Receives the events of the port: the router. Called on the port's event loop; must not block."""

    def engine_fits(self, card: wire.EngineCard) -> str | None:
        """One line with the reason why this engine cannot serve here, or None."""

    def engine_joined(self, engine: RegisteredEngine, held: Sequence[wire.Held]) -> list[tuple[str, int]]:
        """An engine registered with these parts; returns the (request id, attempt) of those that it shall go on
        with."""

    def engine_left(self, engine: RegisteredEngine, why: str) -> None:
        """The engine is fenced: nothing more arrives from this epoch."""

    def engine_reported(self, engine: RegisteredEngine) -> None:
        """A new report of the engine's load arrived with a heartbeat."""

    def engine_events(self, engine: RegisteredEngine, events: Sequence[wire.Event]) -> int:
        """Tokens and ends of requests, in order. Returns how many of them advance a request."""


@dataclass(slots=True)
class Counts:
    """Counters of the port."""

    connections: int = 0
    refused_secret: int = 0
    refused_tls: int = 0
    refused_protocol: int = 0
    refused_registration: int = 0
    registered: int = 0
    lost: int = 0
    fenced_frames: int = 0
    strangers_dropped: int = 0
    listener_failures: int = 0
    preemptions: int = 0  # at engines, while they were registered


class EngineRegistry:
    """Serves the control protocol on a bound socket. `router_id` is new with each start."""

    def __init__(
        self,
        listener: Listener,
        sock: socket.socket | None,
        secret: Secret | None,
        lease_s: float,
        tls: PeerTls | None = None,
        fronts: int = 0,
        pass_link: PassLink | None = None,
    ) -> None:
        """An engine proves the `secret`, shows a certificate (`tls`), or does both, where both are given. Without a
        `sock` connections are adopted. `fronts`: engines connect to so many front processes, too. Raises ValueError for
        neither secret nor certificates."""
        if secret is None and tls is None:
            raise ValueError("neither a secret nor certificates are given; allowed: one of them, or both")
        self.router_id = secrets.token_hex(8)
        self.lease_s = lease_s
        self.counts = Counts()
        self.engines: dict[str, RegisteredEngine] = {}
        self._listener = listener
        self._sock = sock
        self._secret, self._tls = secret, tls
        self._fronts, self._pass_link = fronts, pass_link
        # Random begin (2^40 values): epochs of two routers are the same only by rare chance.
        self._membership = Membership(lease_s, first_epoch=secrets.randbelow(1 << 40) << 20)
        limits = ConnectionLimits.within(file_limit(), STRANGERS_MAX, ENGINES_MAX, ENGINES_OF_ADDRESS_MAX)
        self._shares: ConnectionShares[asyncio.Task[None]] = ConnectionShares(limits)
        self._dropped: set[asyncio.Task[None]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._budget = MessageBudget()
        self._closed = False

    async def start(self) -> None:
        """Begin to accept connections and to expire leases."""
        if self._sock is not None:
            # asyncio accepts as many at once as the backlog.
            self._server = await asyncio.get_running_loop().create_server(
                lambda: PushStream(self._connected, RECEIVED_AHEAD_BYTES), sock=self._sock, backlog=ACCEPT_AT_ONCE
            )
            self._sock.listen(BACKLOG)
        expire = asyncio.create_task(self._expire())
        self._keep(expire)

    async def close(self) -> None:
        """Stop listening and cut every connection: engines go on for a while, and register with the next router."""
        self._closed = True
        if self._server is not None:
            self._server.close()
        for engine in self.engines.values():
            engine.stream.transport.abort()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def adopt(self, sock: socket.socket, greeting: bytes) -> None:
        """Serve a connection that another process accepted, and of which it has read the engine's greeting. Raises
        OSError."""
        connected = partial(self._connected, greeted=greeting)
        await asyncio.get_running_loop().connect_accepted_socket(
            lambda: PushStream(connected, RECEIVED_AHEAD_BYTES), sock
        )

    def lose(self, name: str, why: str) -> None:
        """End the registration of this engine, if there is one."""
        engine = self.engines.get(name)
        if engine is not None:
            self._lose(engine, why)

    def send(self, engine: RegisteredEngine, message: wire.FromRouter) -> None:
        """Queue a message for an engine; an engine that does not receive its messages counts as lost."""
        if self.engines.get(engine.card.name) is not engine:
            return
        stream, transport = engine.stream, engine.stream.transport
        if transport.is_closing():
            return  # its reader notices, and its requests are placed again
        stream.write(wire.frame(message))
        if transport.get_write_buffer_size() > UNSENT_BYTES_MAX:
            self._lose(engine, f"it does not receive what is sent: {UNSENT_BYTES_MAX >> 20} MiB wait")

    # -- connections --------------------------------------------------------------------------------------------

    def _keep(self, task: asyncio.Task[None] | None) -> None:
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connected(self, stream: PushStream, greeted: bytes = b"") -> None:
        task = asyncio.current_task()
        assert task is not None
        self._keep(task)
        host, port = (stream.transport.get_extra_info("peername") or ("?", 0))[:2]
        peer = format_address(host, port)
        self.counts.connections += 1
        engine: RegisteredEngine | None = None
        why = "the connection failed"
        address = network_of(host)
        leaves = self._shares.came(task, address)
        try:
            if leaves is not None:
                self._drop(leaves)
            engine = await self._admit(stream, greeted, peer, address, task)
            if engine is not None:
                why = await self._serve(engine, engine.stream, address)
        except wire.ProtocolError as error:
            why = str(error)
            self.counts.refused_protocol += 1
            rare.warning(f"protocol {kind_of(error)}", "connection of %s closed: %s", peer, error)
        except SecretRefused as error:
            self.counts.refused_secret += 1
            rare.warning(f"secret {kind_of(error)}", "connection of %s refused: %s", peer, error)
        except TlsError as error:
            self.counts.refused_tls += 1
            rare.warning(f"tls {kind_of(error)}", "connection of %s refused: %s", peer, error)
        except (OSError, asyncio.IncompleteReadError) as error:
            why = "the connection ended" if isinstance(error, asyncio.IncompleteReadError) else str(error)
            log.debug("connection of %s ended: %s", peer, error)
        except asyncio.CancelledError:
            if not self._closed and task not in self._dropped:
                raise
        except Exception as error:  # noqa: BLE001 (of one connection; the port serves the others)
            why = f"internal error: {error!r}"
            rare.exception("connection", "connection of %s failed: %r", peer, error)
        finally:
            self._dropped.discard(task)
            self._shares.left(task)
            if engine is not None:
                self._lose(engine, why)
            stream.transport.abort() if engine is not None else stream.close()

    async def _admit(
        self,
        plain: PushStream,
        greeted: bytes,
        peer: str,
        address: str,
        task: asyncio.Task[None],
    ) -> RegisteredEngine | None:
        """Admit an unknown peer as an engine; None: it was refused, or passed to a front. `greeted`: its greeting,
        where that was read already. Raises ProtocolError, SecretRefused, TlsError or another OSError."""
        secret, tls = self._secret, self._tls
        stream: Stream = plain
        try:
            async with asyncio.timeout(wire.HANDSHAKE_S):
                first = greeted or await plain.readexactly(wire.GREETING.size)
                front = wire.front_of(first)
                if front is not None and not greeted:
                    self._pass_on(plain, front, first)
                    return None
                greeting = wire.GREETING if front is None else wire.front_greeting(front)
                plain.write(greeting.pack(secret is not None, tls is not None))
                greeting.check(first, secret is not None, tls is not None)
                if tls is not None:
                    stream = await begin_tls(plain, tls)
                if secret is not None:
                    await self._challenge(secret, stream)
                register, held = await self._first_messages(stream, address)
        except TimeoutError:
            raise wire.ProtocolError(f"it did not register within {wire.HANDSHAKE_S:g} s") from None
        return self._register(register, held, stream, peer, task)

    def _pass_on(self, stream: PushStream, front: int, greeting: bytes) -> None:
        """Pass the connection to a front process; the engine says no more before it is answered. Raises ProtocolError;
        ConnectionError where that front is not there at present, and the engine tries again."""
        if self._pass_link is None or front >= self._fronts:
            raise wire.ProtocolError(f"it asks for front {front}; this router has {self._fronts}")
        if not self._pass_link(front, greeting, stream.transport.get_extra_info("socket").fileno()):
            raise ConnectionError(f"front {front} is not there")

    def _drop(self, stranger: asyncio.Task[None]) -> None:
        """Close the connection of a peer that has not registered, for another one."""
        self._dropped.add(stranger)
        stranger.cancel()
        self.counts.strangers_dropped += 1
        most = self._shares.limits.strangers
        rare.warning("strangers", "%d connections have not registered, the limit: the oldest one is closed", most)

    def _notify(self, call: Callable[[], None]) -> None:
        """Call the listener; an exception in it is logged and ends no registration."""
        try:
            call()
        except Exception as error:  # noqa: BLE001 (of one message; the connection goes on)
            self.counts.listener_failures += 1
            rare.exception("listener", "a message of an engine could not be processed: %r", error)

    async def _challenge(self, secret: Secret, stream: Stream) -> None:
        nonce = os.urandom(NONCE_BYTES)
        stream.write(nonce)
        answer = await stream.readexactly(NONCE_BYTES + PROOF_BYTES)
        stream.write(secret.check(wire.PURPOSE, nonce, answer))

    async def _first_messages(self, stream: Stream, address: str) -> tuple[wire.Register, list[wire.Held]]:
        """The Register message of an engine, and all parts that it holds."""
        register = await self._first(wire.Register, stream, address)
        held = list(register.held)
        for _ in range(register.more):
            held += (await self._first(wire.MoreHeld, stream, address)).held
        return register, held

    async def _first(self, kind: type[First], stream: Stream, address: str) -> First:
        body, begin_s = await _frame(stream), time.thread_time()
        message = wire.decode_from_engine(body)
        if not isinstance(message, kind):
            raise wire.ProtocolError(f"{type(message).__name__} before it is registered; allowed: {kind.__name__}")
        await self._pause(address, time.thread_time() - begin_s + REGISTER_S)
        return message

    async def _pause(self, address: str, used_s: float) -> None:
        """Charge time that advanced no request, and pause for it. Other connections have their turn even when the pause
        is short."""
        await asyncio.sleep(self._budget.used(address, used_s, time.monotonic()))

    def _register(
        self, register: wire.Register, held: Sequence[wire.Held], stream: Stream, peer: str, task: asyncio.Task[None]
    ) -> RegisteredEngine | None:
        card, now = register.card, time.monotonic()
        reason = self._listener.engine_fits(card)
        retry = False
        if reason is None and len(self.engines) >= ENGINES_MAX and card.name not in self.engines:
            reason, retry = f"{ENGINES_MAX} engines are registered; that is the limit", True
        refused = self._shares.proved(task) if reason is None else None
        if refused is not None:
            reason, retry = f"the router {refused}", True
        known = self.engines.get(card.name)
        epoch = 0
        if reason is None:
            try:
                epoch = self._membership.register(card.name, card.instance, now)
            except NameTaken as error:
                reason, retry = str(error), True
        if reason is not None:
            self.counts.refused_registration += 1
            rare.warning(f"not taken {card.name}", "engine %s (%s) is refused: %s", card.name, peer, reason)
            stream.write(wire.frame(wire.Refused(clip(reason), retry)))
            return None
        if known is not None:
            self._forget(known, "it registered anew")
        engine = RegisteredEngine(card, epoch, register.report, peer, now, stream, now)
        self.engines[card.name] = engine
        self.counts.registered += 1
        try:
            keep = self._listener.engine_joined(engine, held)
        except Exception as error:  # noqa: BLE001 (this engine is refused; the others go on)
            self.counts.listener_failures += 1
            rare.exception("join", "engine %s could not be registered: %r", card.name, error)
            stream.write(wire.frame(wire.Refused(clip(f"internal error: {error!r}"), retry=True)))
            self._membership.end(card.name, epoch)
            self._forget(engine, "it could not be registered", after_all=True)
            return None
        welcome = wire.Welcome(epoch, self.router_id, self.lease_s, self.lease_s / BEATS_PER_LEASE, keep, self._fronts)
        # Welcome is sent first; requests that the listener places from now on follow it.
        stream.write(wire.frame(welcome))
        log.info("engine %s (%s) registered from %s: epoch %d", card.name, card.role, peer, epoch)
        self._notify(lambda: self._listener.engine_reported(engine))
        return engine

    async def _serve(self, engine: RegisteredEngine, stream: Stream, address: str) -> str:
        """Serve until the engine leaves or is fenced; returns why. Raises what ends the connection otherwise."""
        over: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def pause_s(wasted_s: float) -> float:
            return self._budget.used(address, wasted_s, time.monotonic())

        FrameFlow(stream, partial(self._take, engine), pause_s, over)
        return await over

    def _take(self, engine: RegisteredEngine, body: bytes) -> float | str:
        """A message of a registered engine; see `FrameFlow`. Raises ProtocolError."""
        message = wire.decode_from_engine(body)
        if isinstance(message, wire.Heartbeat):
            return self._heartbeat(engine, message)
        if isinstance(message, FIRST):
            raise wire.ProtocolError("it registered twice on one connection")
        if message.epoch != engine.epoch or not self._membership.is_current(engine.name, engine.epoch):
            return self._fenced(engine, "its epoch is over")
        engine.heard_s = time.monotonic()
        if isinstance(message, wire.Events):
            return self._events(engine, message.events)
        return message.why

    def _heartbeat(self, engine: RegisteredEngine, message: wire.Heartbeat) -> float | str:
        """As `_take`. There are more than a thousand a second of these where there are many engines."""
        name, now_s, report = engine.card.name, time.monotonic(), message.report
        if message.epoch != engine.epoch or not self._membership.renew(name, engine.epoch, now_s):
            current = message.epoch == engine.epoch and self._membership.is_current(name, engine.epoch)
            return self._fenced(engine, "its lease had ended" if current else "its epoch is over")
        engine.heard_s = now_s
        self.send(engine, wire.Beat(message.sequence))
        if report.preemptions > engine.report.preemptions:
            self.counts.preemptions += report.preemptions - engine.report.preemptions
        engine.report, engine.placed_seen = report, message.placed
        self._notify(lambda: self._listener.engine_reported(engine))
        return 0.0

    def _fenced(self, engine: RegisteredEngine, why: str) -> str:
        self.counts.fenced_frames += 1
        engine.stream.write(wire.frame(wire.Fenced(why)))
        return why

    def _events(self, engine: RegisteredEngine, events: Sequence[wire.Event]) -> float:
        """Pass events on; returns the share of them that advanced a request."""
        useful: list[int] = []
        self._notify(lambda: useful.append(self._listener.engine_events(engine, events)))
        return sum(useful) / max(1, len(events))

    # -- leases -------------------------------------------------------------------------------------------------

    async def _expire(self) -> None:
        """Fence engines that have not renewed their lease."""
        while True:
            next_s = self._membership.next_expiry_s()
            left_s = max(0.001, next_s - time.monotonic()) if next_s else self.lease_s
            await asyncio.sleep(min(self.lease_s / 8, left_s))
            self._notify(self._fence_silent)

    def _fence_silent(self) -> None:
        for name, epoch in self._membership.expired(time.monotonic()):
            engine = self.engines.get(name)
            if engine is not None and engine.epoch == epoch:
                log.warning("engine %s is fenced: it has sent nothing for %.1f s", name, self.lease_s)
                self._forget(engine, f"no heartbeat within {self.lease_s:g} s")

    def _lose(self, engine: RegisteredEngine, why: str) -> None:
        if self._membership.end(engine.name, engine.epoch):
            if not self._closed:
                rare.warning(f"left {engine.name}", "engine %s left: %s", engine.name, why)
            self._forget(engine, why)

    def _forget(self, engine: RegisteredEngine, why: str, after_all: bool = False) -> None:
        """End an epoch: cut the connection (unless it is `after_all` being answered), and notify the listener."""
        if self.engines.get(engine.name) is engine:
            del self.engines[engine.name]
            self.counts.lost += 1
            if not after_all:
                engine.stream.transport.abort()
            self._notify(lambda: self._listener.engine_left(engine, why))


async def _frame(stream: Stream) -> bytes:
    head = await stream.readexactly(wire.LENGTH.size)
    return await stream.readexactly(wire.frame_length(head, wire.ENGINE_FRAME_BYTES_MAX))
