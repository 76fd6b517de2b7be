"""The engine's side of the control connection: it connects to the router, registers, renews its lease, serves requests.

Without a lease it serves nothing: it stops all requests, except those that a client may ask for again (their tokens are
stored for KEEP_S, and offered to the router at the next registration). Each connection has one reader, on this class's
own thread, and one sender.

Where a router has front processes, requests and tokens go over a connection to each of them (`front_links`), which is a
registration, too; that with the router itself then says only what the engine is and how loaded.
"""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import msgspec

from penstock.cluster import wire
from penstock.cluster.engine.front_links import FrontLinks
from penstock.cluster.engine.resumable_parts import ResumablePart, ResumableParts
from penstock.cluster.messages import EngineReport, PlacedRequest
from penstock.cluster.wire_types import clip
from penstock.core.cluster.membership import OwnLease
from penstock.engine.api import InvalidRequest, Overloaded, TokenEvent
from penstock.pool.losses import count_loss
from penstock.pool.net.secret import Secret, SecretRefused, prove_as_client
from penstock.pool.net.tls import PeerTls
from penstock.pool.net.tls_socket import Stream, begin_tls
from penstock.process.guarded_thread import GuardedThread
from penstock.process.rate_limited_log import RateLimitedLog
from penstock.units import format_address

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

KEEP_S = 60.0
DIAL_TIMEOUT_S = 5.0
UNHEALTHY_S = 10.0  # an engine without progress for so long ends, and its supervisor restarts it
PAUSES_S = (0.05, 1.0)  # between attempts to register, growing
JOIN_S = 60.0  # wait for the sender, whose connection is cut
_RECEIVE_POLL_S = 0.25


class Host(Protocol):
    """The engine that is registered (`cluster.engine.host.EngineHost`)."""

    def submit(self, placed: PlacedRequest, on_event: Callable[[TokenEvent], None]) -> None:
        """Begin a part of a request; `on_event` is called from any thread, with exactly one last event. Raises
        InvalidRequest or Overloaded, and then `on_event` is not called."""

    def cancel(self, request_id: str, attempt: int | None = None) -> None:
        """End a request soon, or only one attempt of it; unknown ones are ignored."""

    def replan(self, request_id: str, attempt: int, side: Literal["prefill", "decode"]) -> None:
        """The storage NIC of that side is down: remaining reads of this attempt move to the other side."""

    def report(self) -> EngineReport:
        """The engine's load and counters now."""

    def healthy(self) -> tuple[bool, str]:
        """Whether the engine serves, and if not, why."""


@dataclass(frozen=True, slots=True)
class RegistrationSettings:
    """`router` is (host, port) of its cluster port. `secret`, `tls` or both prove that this engine belongs to the
    cluster. `front`: the front process of the router that the connection is for; None: the router itself."""

    router: tuple[str, int]
    secret: Secret | None
    keep_s: float = KEEP_S
    unhealthy_s: float = UNHEALTHY_S
    tls: PeerTls | None = None
    front: int | None = None


class RegistrationRefused(Exception):
    """The router refuses this engine; `final`: for good."""

    def __init__(self, reason: str, final: bool) -> None:
        super().__init__(reason)
        self.final = final


class _Session:
    """One registration: its connection, epoch and lease."""

    def __init__(self, sock: Stream, welcome: wire.Welcome, sent_s: float) -> None:
        self.sock = sock
        self.welcome = welcome
        self.placed = 0
        self.lease = OwnLease(welcome.lease_s, sent_s)
        self.over: str | None = None
        self._lock = threading.Lock()

    def send(self, *frames: bytes) -> None:
        """Send a message. Raises OSError, also when the router receives nothing for the time of a lease."""
        for data in frames:
            with self._lock:
                self.sock.sendall(data)

    def cut(self, why: str) -> None:
        self.over = self.over or why
        _shut(self.sock)


class EngineRegistration:
    """Runs from construction to `close`. `ended` is set, with `failure`, when the router refuses it for good, or
    when the engine itself has failed."""

    def __init__(
        self,
        host: Host,
        card: wire.EngineCard,
        settings: RegistrationSettings,
        on_refused: Callable[[], None] = lambda: None,
        on_registered: Callable[[], None] = lambda: None,
        on_placed: Callable[[int], None] = lambda number: None,
    ) -> None:
        """`on_refused` is called once, when this engine will not serve again (see `failure`); `on_registered` after
        each registration, `on_placed` with the number of each placement."""
        self.card = msgspec.structs.replace(card, links_to_fronts=True)
        self.failure: str | None = None
        self.ended = threading.Event()
        self.registered = threading.Event()
        self._host = host
        self._settings = settings
        self._on_refused, self._on_registered, self._on_placed = on_refused, on_registered, on_placed
        self._place = format_address(*settings.router)
        if settings.front is not None:
            self._place += f" (front {settings.front})"
        self._links = FrontLinks(self._link_to)
        self._lock = threading.Lock()
        self._to_send = threading.Condition(self._lock)
        self._held = ResumableParts(settings.keep_s)
        self._session: _Session | None = None
        self._dialed: socket.socket | None = None  # while it registers
        self._closing = threading.Event()
        self._logged_state = ""
        self._lost_s: float | None = None
        self._unhealthy_s: float | None = None
        self._thread = GuardedThread(
            "penstock-agent", self._run, failed=lambda error: self._fail(f"its connection to the router: {error!r}")
        )
        self._thread.start()

    @property
    def epoch(self) -> int | None:
        """Epoch of the current registration; None without one."""
        session = self._session
        return session.welcome.epoch if session is not None else None

    def close(self, timeout_s: float, why: str = "the engine ends") -> None:
        """Leave the cluster: the router places the requests of this engine again."""
        self._closing.set()
        with self._lock:
            session, dialed = self._session, self._dialed
        if session is not None:
            try:
                session.send(wire.frame(wire.Leave(session.welcome.epoch, clip(why))))
            except (OSError, wire.ProtocolError) as error:
                log.debug("the router was not notified: %s", error)
            session.cut("closed")
        elif dialed is not None:
            _shut(dialed)
        self._links.close(timeout_s, why)
        self._thread.join(timeout_s)
        self._stop_all()

    # -- connecting ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause_s = PAUSES_S[0]
        while not self._closing.is_set():
            try:
                self._register_and_serve()
                pause_s = PAUSES_S[0]
            except RegistrationRefused as error:
                self._log_state(f"router {self._place} refuses this engine: {error}")
                if error.final:
                    self._fail(f"router {self._place} refuses this engine: {error}")
                    return
            except (OSError, wire.ProtocolError, SecretRefused) as error:
                self._log_state(f"router {self._place}: {error}; it is tried again")
            except Exception as error:  # noqa: BLE001 (the engine registers again)
                count_loss("registrations")
                rare.exception("registration", "the connection to router %s failed: %r", self._place, error)
            with self._lock:
                self._held.drop_old(time.monotonic())
            if self._lost_s is not None and time.monotonic() - self._lost_s > self._settings.keep_s:
                self._stop_all()
            if (why := self._unhealthy()) is not None:
                self._fail(f"the engine has failed: {why}")
                return
            self._closing.wait(pause_s * random.uniform(0.7, 1.3))  # noqa: S311 (to spread engines in time; not secret)
            pause_s = min(2 * pause_s, PAUSES_S[1])

    def _fail(self, why: str) -> None:
        self.failure = why
        self._stop_all()
        self.ended.set()
        self._on_refused()

    def _unhealthy(self) -> str | None:
        """Why the engine has made no progress for `unhealthy_s`, as seen between registrations."""
        healthy, why = self._host.healthy()
        now = time.monotonic()
        if healthy:
            self._unhealthy_s = None
            return None
        self._unhealthy_s = self._unhealthy_s or now
        return why if now - self._unhealthy_s > self._settings.unhealthy_s else None

    def _log_state(self, line: str) -> None:
        """Log a state of the router, once until it changes."""
        if line != self._logged_state:
            log.warning("%s", line)
            self._logged_state = line

    def _register_and_serve(self) -> None:
        sock = socket.create_connection(self._settings.router, timeout=DIAL_TIMEOUT_S)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._dialed = sock
            if self._closing.is_set():  # `close` did not see the socket
                return
            session = self._register(sock)
            self._serve(session)
        finally:
            sock.close()

    def _register(self, plain: socket.socket) -> _Session:
        sock = self._prove(plain)
        with self._lock:
            held = self._held.records()
        sent_s = time.monotonic()
        sock.sendall(b"".join(wire.register_frames(self.card, self._report(), held)))
        answer = wire.decode_from_router(_receive_frame(sock))
        if isinstance(answer, wire.Refused):
            raise RegistrationRefused(answer.reason, not answer.retry)
        if not isinstance(answer, wire.Welcome):
            raise wire.ProtocolError(f"the router answered with {type(answer).__name__}")
        with self._lock:
            dropped = self._held.keep_only({(request_id, attempt) for request_id, attempt in answer.keep})
        for request_id, attempt in dropped:
            self._cancel(request_id, attempt)
        return _Session(sock, answer, sent_s)

    def _report(self) -> EngineReport:
        """For the router, which places; its front processes do not ask how loaded this engine is."""
        return self._host.report() if self._settings.front is None else EngineReport()

    def _prove(self, plain: socket.socket) -> Stream:
        """The connection after both sides have proven certificate or secret, as configured. Raises OSError,
        ProtocolError or SecretRefused."""
        secret, tls, until_s = self._settings.secret, self._settings.tls, time.monotonic() + wire.HANDSHAKE_S
        front = self._settings.front
        greeting = wire.GREETING if front is None else wire.front_greeting(front)
        plain.settimeout(wire.HANDSHAKE_S)
        plain.sendall(greeting.pack(secret is not None, tls is not None))
        greeting.check(_receive(plain, greeting.size), secret is not None, tls is not None)
        sock: Stream = plain
        if tls is not None:
            sock = begin_tls(plain, tls, "client", self._settings.router[0], until_s)
        if secret is not None:
            prove_as_client(sock, secret, wire.PURPOSE)
        return sock

    # -- one registration ---------------------------------------------------------------------------------------

    def _serve(self, session: _Session) -> None:
        """Serve until the connection or the lease ends."""
        session.sock.settimeout(max(_RECEIVE_POLL_S, session.welcome.lease_s))
        self._logged_state, self._lost_s = "", None
        log.info("registered with router %s: epoch %d", self._place, session.welcome.epoch)
        sender = GuardedThread(
            "penstock-agent-send",
            lambda: self._send_all(session),
            failed=lambda error: session.cut(f"sending failed: {error!r}"),
        )
        with self._lock:
            self._session, self._dialed = session, None
        if self._closing.is_set():  # `close` did not see the session
            session.cut("closed")
        self._links.open(session.welcome.fronts)
        self._linked()
        sender.start()
        why = "the connection failed"
        try:
            self._receive_all(session)
        except (OSError, wire.ProtocolError) as error:
            why = str(error)
        finally:
            session.cut(why)
            with self._lock:
                self._session = None
                self.registered.clear()
                self._to_send.notify_all()
            sender.join(JOIN_S)
            self._lost_s = time.monotonic()
            if not self._closing.is_set():
                self._log_state(f"router {self._place} is lost: {session.over}")
            self._stop_all_but_resumable()

    def _link_to(self, front: int) -> EngineRegistration:
        """A connection to a front process of the router."""
        settings = replace(self._settings, front=front)
        return EngineRegistration(
            self._host, self.card, settings, on_registered=self._linked, on_placed=self._links.placed
        )

    def _linked(self) -> None:
        """`registered` is set once requests can come: over all connections that the router asks for."""
        with self._lock:
            if self._session is None or self.registered.is_set() or not self._links.all_registered(time.monotonic()):
                return
            self.registered.set()
        self._on_registered()

    def _receive_all(self, session: _Session) -> None:
        while session.over is None:
            message = wire.decode_from_router(_receive_frame(session.sock))
            if isinstance(message, wire.Beat):
                session.lease.acknowledged(message.sequence)
            elif isinstance(message, wire.Place):
                self._placed(session, message.placed)
            elif isinstance(message, wire.Cancel):
                if message.epoch == session.welcome.epoch:
                    self._cancelled(message)
            elif isinstance(message, wire.Replan):
                if message.epoch == session.welcome.epoch:
                    self._replan(message)
            elif isinstance(message, wire.Fenced):
                raise ConnectionError(f"fenced: {message.reason}")
            else:
                raise wire.ProtocolError(f"the router sent {type(message).__name__}")

    def _placed(self, session: _Session, placed: PlacedRequest) -> None:
        """Begin a part. A part that cannot be served is answered too, as the router waits for every part that it
        placed."""
        if placed.epoch != session.welcome.epoch:
            raise wire.ProtocolError(f"it placed for epoch {placed.epoch}; this is {session.welcome.epoch}")
        if not session.lease.valid(time.monotonic()):
            raise ConnectionError("it placed a request after the lease had ended")
        with self._lock:
            known = (placed.request_id, placed.attempt) in self._held
            stale = self._held.drop([part.key for part in self._held.attempts(placed.request_id)])
            part = self._held.add(placed)
        for key in stale:
            self._cancel(*key)
        if known:  # two parts with the same name cannot be distinguished: both end
            count_loss("placed_twice")
            rare.warning("twice", "request %s, attempt %d, was placed here twice", placed.request_id, placed.attempt)
            self._event(part, TokenEvent(None, "restart", "the same attempt was placed here twice"))
            return
        try:
            self._host.submit(placed, lambda event: self._event(part, event))
        except InvalidRequest as error:
            self._event(part, TokenEvent(None, "error", str(error)))
        except Overloaded as error:
            self._event(part, TokenEvent(None, "restart", str(error)))
        except Exception as error:  # noqa: BLE001 (of this request; the others go on)
            count_loss("failed_to_begin")
            rare.exception("begin", "request %s could not begin: %r", placed.request_id, error)
            self._event(part, TokenEvent(None, "error", f"the request could not begin: {error!r}"))

    def _cancelled(self, message: wire.Cancel) -> None:
        with self._lock:
            parts = self._held.attempts(message.request_id)
            self._held.drop([part.key for part in parts if message.attempt in (None, part.key[1])])
        self._cancel(message.request_id, message.attempt)

    def _cancel(self, request_id: str, attempt: int | None) -> None:
        try:
            self._host.cancel(request_id, attempt)
        except Exception as error:  # noqa: BLE001 (of one request; the connection goes on)
            count_loss("cancels")
            rare.exception("cancel", "request %s could not be cancelled: %r", request_id, error)

    def _replan(self, message: wire.Replan) -> None:
        try:
            self._host.replan(message.request_id, message.attempt, message.side)
        except Exception as error:  # noqa: BLE001 (its reads end by their deadlines)
            count_loss("replans")
            rare.exception("replan", "request %s could not be replanned: %r", message.request_id, error)

    def _event(self, part: ResumablePart, event: TokenEvent) -> None:
        """Record an event; called on a thread of the engine."""
        with self._lock:
            if part.finish_reason is None:
                part.take(event)
                self._held.fresh(part)
                self._to_send.notify_all()

    def _send_all(self, session: _Session) -> None:
        sequence = 0
        next_beat_s = time.monotonic()
        try:
            while session.over is None:
                now = time.monotonic()
                if not session.lease.valid(now):
                    session.cut(f"the router did not answer for {session.lease.lease_s:g} s: the lease is over")
                    return
                if now >= next_beat_s:
                    sequence += 1
                    session.lease.sent(sequence, now)
                    placed = max(session.placed, self._links.highest)
                    beat = wire.Heartbeat(session.welcome.epoch, sequence, self._report(), placed)
                    session.send(wire.frame(beat))
                    self._linked()
                    next_beat_s = now + session.welcome.heartbeat_s
                with self._lock:
                    self._held.drop_old(now)
                    if not self._held.anything_to_send():
                        self._to_send.wait(max(0.0, min(next_beat_s, session.lease.until_s) - time.monotonic()))
                    if self._session is not session:
                        return
                    events = self._held.to_send()
                if events and session.lease.valid(time.monotonic()):
                    session.send(*wire.event_frames(session.welcome.epoch, events))
        except (OSError, wire.ProtocolError) as error:
            session.cut(str(error))

    def _stop_all_but_resumable(self) -> None:
        with self._lock:
            stopped = self._held.keep_only(self._held.resumable())
        for request_id, attempt in stopped:
            self._cancel(request_id, attempt)

    def _stop_all(self) -> None:
        with self._lock:
            stopped = self._held.keep_only(())
        for request_id, attempt in stopped:
            self._cancel(request_id, attempt)


def _shut(sock: Stream) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _receive_frame(sock: Stream) -> bytes:
    return _receive(sock, wire.frame_length(_receive(sock, wire.LENGTH.size)))


def _receive(sock: Stream, size: int) -> bytes:
    """Receive `size` bytes. Raises OSError, which includes TimeoutError."""
    parts = bytearray(size)
    view = memoryview(parts)
    got = 0
    while got < size:
        received = sock.recv_into(view[got:])
        if not received:
            raise ConnectionError("the peer closed the connection")
        got += received
    return bytes(parts)
