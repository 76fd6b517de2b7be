"""The router's cluster port: registers engines, renews their leases, refuses unknown peers and frames of old epochs.

Everything here runs on one event loop. Events are passed to a `Listener`, whose methods run on that loop too; an
exception in one is logged and counted, and ends at most a registration.

An engine's frames are short, and other engines have their turn after AT_ONCE_S. Messages that advance no request
(heartbeats, and events for which nobody waits) may use only a share of the time, by address
(`pool.net.message_budget`): an engine that sends without end does not delay the others.

A connection must register within HANDSHAKE_S. When STRANGERS_MAX connections have not registered, the oldest one of the
address with the most of them is closed for the next: a peer with the secret needs only a few milliseconds. Engines are
limited separately, also by address (`core.connection_limits`).
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
from typing import Protocol, TypeVar

from penstock.cluster import wire
from penstock.cluster.messages import EngineReport
from penstock.cluster.wire_types import clip
from penstock.core.cluster.membership import Membership, NameTaken
from penstock.core.connection_limits import ConnectionLimits, ConnectionShares, network_of
from penstock.pool.net.message_budget import MessageBudget
from penstock.pool.net.secret import NONCE_BYTES, PROOF_BYTES, Secret, SecretRefused
from penstock.pool.net.tls import PeerTls, TlsError
from penstock.pool.net.tls_streams import Reader, Writer, begin_tls
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
AT_ONCE_S = 0.0002  # time for one engine's messages before the others have their turn
MESSAGE_S = 1e-5  # CPU time to read a message, without its content
REGISTER_S = 0.001  # CPU time of a registration and of its end
UNSENT_BYTES_MAX = 256 << 20  # unsent bytes to one engine; above, the engine counts as lost
BEATS_PER_LEASE = 4

First = TypeVar("First", wire.Register, wire.MoreHeld)


@dataclass(eq=False, slots=True)
class RegisteredEngine:
    """A registered engine. `epoch` is current as long as the engine is registered."""

    card: wire.EngineCard
    epoch: int
    report: EngineReport
    peer: str
    since_s: float
    writer: Writer
    heard_s: float = 0.0
    placed_seen: int = 0  # Place messages that the report includes

    @property
    def name(self) -> str:
        """The name under which the engine registered."""
        return self.card.name


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
        sock: socket.socket,
        secret: Secret | None,
        lease_s: float,
        tls: PeerTls | None = None,
    ) -> None:
        """An engine proves the `secret`, shows a certificate (`tls`), or does both, where both are given. Raises
        ValueError where neither is."""
        if secret is None and tls is None:
            raise ValueError("neither a secret nor certificates are given; allowed: one of them, or both")
        self.router_id = secrets.token_hex(8)
        self.lease_s = lease_s
        self.counts = Counts()
        self.engines: dict[str, RegisteredEngine] = {}
        self._listener = listener
        self._sock = sock
        self._secret, self._tls = secret, tls
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
        # asyncio accepts as many at once as the backlog.
        self._server = await asyncio.start_server(
            self._connected, sock=self._sock, limit=1 << 20, backlog=ACCEPT_AT_ONCE
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
            engine.writer.transport.abort()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def send(self, engine: RegisteredEngine, message: wire.FromRouter) -> None:
        """Queue a message for an engine; an engine that does not receive its messages counts as lost."""
        if self.engines.get(engine.name) is not engine:
            return
        if engine.writer.transport.is_closing():
            return  # its reader notices, and its requests are placed again
        engine.writer.write(wire.frame(message))
        if engine.writer.transport.get_write_buffer_size() > UNSENT_BYTES_MAX:
            self._lose(engine, f"it does not receive what is sent: {UNSENT_BYTES_MAX >> 20} MiB wait")

    # -- connections --------------------------------------------------------------------------------------------

    def _keep(self, task: asyncio.Task[None] | None) -> None:
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._keep(task)
        host, port = (writer.get_extra_info("peername") or ("?", 0))[:2]
        peer = format_address(host, port)
        self.counts.connections += 1
        engine: RegisteredEngine | None = None
        why = "the connection failed"
        address = network_of(host)
        leaves = self._shares.came(task, address)
        try:
            if leaves is not None:
                self._drop(leaves)
            engine, source = await self._admit(reader, writer, peer, address, task)
            if engine is not None:
                why = await self._serve(engine, source, address)
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
            writer.transport.abort() if engine is not None else writer.close()

    async def _admit(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        peer: str,
        address: str,
        task: asyncio.Task[None],
    ) -> tuple[RegisteredEngine | None, Reader]:
        """Admit an unknown peer as an engine; returns the engine and its reader. Raises ProtocolError, SecretRefused,
        TlsError or another OSError."""
        secret, tls = self._secret, self._tls
        source: Reader = reader
        target: Writer = writer
        try:
            async with asyncio.timeout(wire.HANDSHAKE_S):
                first = await reader.readexactly(wire.GREETING.size)
                writer.write(wire.greeting(secret is not None, tls is not None))
                wire.check_greeting(first, secret is not None, tls is not None)
                if tls is not None:
                    source = target = await begin_tls(reader, writer, tls)
                if secret is not None:
                    await self._challenge(secret, source, target)
                register, held = await self._first_messages(source, address)
        except TimeoutError:
            raise wire.ProtocolError(f"it did not register within {wire.HANDSHAKE_S:g} s") from None
        return self._register(register, held, target, peer, task), source

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

    async def _challenge(self, secret: Secret, reader: Reader, writer: Writer) -> None:
        nonce = os.urandom(NONCE_BYTES)
        writer.write(nonce)
        answer = await reader.readexactly(NONCE_BYTES + PROOF_BYTES)
        writer.write(secret.check(wire.PURPOSE, nonce, answer))

    async def _first_messages(self, reader: Reader, address: str) -> tuple[wire.Register, list[wire.Held]]:
        """The Register message of an engine, and all parts that it holds."""
        register = await self._first(wire.Register, reader, address)
        held = list(register.held)
        for _ in range(register.more):
            held += (await self._first(wire.MoreHeld, reader, address)).held
        return register, held

    async def _first(self, kind: type[First], reader: Reader, address: str) -> First:
        body, begin_s = await _frame(reader), time.thread_time()
        message = wire.decode_from_engine(body)
        if not isinstance(message, kind):
            raise wire.ProtocolError(f"{type(message).__name__} before it is registered; allowed: {kind.__name__}")
        await self._pause(address, time.thread_time() - begin_s + REGISTER_S)
        return message

    async def _pause(self, address: str, used_s: float) -> None:
        """Charge time that advanced no request, and pause for it. Other connections have their turn even when the pause
        is short."""
        await asyncio.sleep(self._budget.used(address, used_s, _now()))

    def _register(
        self, register: wire.Register, held: Sequence[wire.Held], writer: Writer, peer: str, task: asyncio.Task[None]
    ) -> RegisteredEngine | None:
        card, now = register.card, _now()
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
            writer.write(wire.frame(wire.Refused(clip(reason), retry)))
            return None
        if known is not None:
            self._forget(known, "it registered anew")
        engine = RegisteredEngine(card, epoch, register.report, peer, now, writer, now)
        self.engines[card.name] = engine
        self.counts.registered += 1
        try:
            keep = self._listener.engine_joined(engine, held)
        except Exception as error:  # noqa: BLE001 (this engine is refused; the others go on)
            self.counts.listener_failures += 1
            rare.exception("join", "engine %s could not be registered: %r", card.name, error)
            writer.write(wire.frame(wire.Refused(clip(f"internal error: {error!r}"), retry=True)))
            self._membership.end(card.name, epoch)
            self._forget(engine, "it could not be registered", after_all=True)
            return None
        welcome = wire.Welcome(epoch, self.router_id, self.lease_s, self.lease_s / BEATS_PER_LEASE, keep)
        # Welcome is sent first; requests that the listener places from now on follow it.
        writer.write(wire.frame(welcome))
        log.info("engine %s (%s) registered from %s: epoch %d", card.name, card.role, peer, epoch)
        self._notify(lambda: self._listener.engine_reported(engine))
        return engine

    async def _serve(self, engine: RegisteredEngine, reader: Reader, address: str) -> str:
        """Serve until the engine leaves or is fenced; returns why."""
        busy_s = wasted_s = 0.0
        while True:
            body, begin_s = await _frame(reader), time.thread_time()
            message = wire.decode_from_engine(body)
            if isinstance(message, wire.Register | wire.MoreHeld):
                raise wire.ProtocolError("it registered twice on one connection")
            if message.epoch != engine.epoch or not self._membership.is_current(engine.name, engine.epoch):
                self.counts.fenced_frames += 1
                engine.writer.write(wire.frame(wire.Fenced("its epoch is over")))
                return "its epoch is over"
            engine.heard_s = _now()
            useful = 0.0
            if isinstance(message, wire.Heartbeat):
                if not self._membership.renew(engine.name, engine.epoch, engine.heard_s):
                    self.counts.fenced_frames += 1
                    engine.writer.write(wire.frame(wire.Fenced("its lease had ended")))
                    return "its lease had ended"
                self.send(engine, wire.Beat(message.sequence))
                self.counts.preemptions += max(0, message.report.preemptions - engine.report.preemptions)
                engine.report, engine.placed_seen = message.report, message.placed
                self._notify(lambda: self._listener.engine_reported(engine))
            elif isinstance(message, wire.Events):
                useful = self._events(engine, message.events)
            else:
                return message.why
            used_s = time.thread_time() - begin_s + MESSAGE_S
            busy_s, wasted_s = busy_s + used_s, wasted_s + used_s * (1.0 - useful)
            if busy_s >= AT_ONCE_S:  # messages received already are read without waiting
                await (self._pause(address, wasted_s) if wasted_s else asyncio.sleep(0))
                busy_s = wasted_s = 0.0

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
            await asyncio.sleep(min(self.lease_s / 8, max(0.001, next_s - _now())) if next_s else self.lease_s / 8)
            self._notify(self._fence_silent)

    def _fence_silent(self) -> None:
        for name, epoch in self._membership.expired(_now()):
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
                engine.writer.transport.abort()
            self._notify(lambda: self._listener.engine_left(engine, why))


async def _frame(reader: Reader) -> bytes:
    head = await reader.readexactly(wire.LENGTH.size)
    return await reader.readexactly(wire.frame_length(head, wire.ENGINE_FRAME_BYTES_MAX))


def _now() -> float:
    return asyncio.get_running_loop().time()
