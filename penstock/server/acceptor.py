"""Accepts the connections of an HTTP port within a budget, and bounds the time of each TLS handshake."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from penstock.core.connection_limits import ConnectionBudget, network_of
from penstock.process.rate_limited_log import RateLimitedLog
from penstock.server.turns import WINDOW_S

rare = RateLimitedLog(logging.getLogger(__name__))

ACCEPTED_AT_ONCE = 8  # connections accepted per WINDOW_S; after that the event loop does other work
ACCEPTED_WHILE_BUSY = 2  # equals the number of requests started per window, see turns.REQUEST_S
DEFER_S = 0.005  # for another process of the same port to accept, which has fewer connections
PAUSE_S = 0.05  # wait after an accept that failed because descriptors or memory ran out
TLS_CLOSE_S = 5.0  # limit for the client's answer to a TLS close
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_BUSY_TEXT = b"all connections that this server may have are serving requests"
_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(_BUSY_TEXT), _BUSY_TEXT)
)


@dataclass(slots=True)
class Admission:
    """One accepted connection and its entry in the connection budget."""

    acceptor: Acceptor
    number: int
    address: str  # the budget counts connections per address
    close: Callable[[], object]  # closes the connection in whatever state it is

    def waits(self) -> None:
        """The connection is idle from now on; it may be closed to make room for others."""
        self.acceptor.close_all(self.acceptor.budget.waits(self.number))

    def serves(self) -> None:
        """The connection serves a request from now on; it is not closed to make room."""
        self.acceptor.budget.serves(self.number)

    def ended(self) -> None:
        """The connection is closed."""
        self.acceptor.forget(self.number)


class Balance(Protocol):
    """Several processes accept on one port: which of them is to take the next connection."""

    def have(self, connections: int | None) -> None:
        """This process has so many connections; None: it accepts no more."""

    def is_mine(self) -> bool:
        """Whether no other process has fewer."""


class Acceptor:
    """Accepts connections on one event loop. Has the methods of an asyncio server that uvicorn calls."""

    def __init__(
        self,
        listener: socket.socket,
        protocol: Callable[[Admission], asyncio.Protocol],
        budget: ConnectionBudget,
        busy: Callable[[], bool],
        tls: ssl.SSLContext | None,
        handshake_timeout_s: float,
        balance: Balance | None = None,
    ) -> None:
        """`listener` is a listening socket; the caller closes it. `busy` says whether open connections have work
        waiting; then fewer new ones are accepted, so that connections with a request are not closed to make room.
        `balance`: other processes accept on the same socket. Where it is the turn of another one, this one waits for
        DEFER_S, then accepts all the same."""
        self.budget = budget
        self._listener = listener
        self._protocol = protocol
        self._busy = busy
        self._tls = tls
        self._handshake_timeout_s = handshake_timeout_s
        self._loop = asyncio.get_running_loop()
        self._admitted: dict[int, Admission] = {}
        self._tasks: dict[asyncio.Task[None], Admission] = {}  # connections that are being established
        self._serial = 0
        self._pause: asyncio.TimerHandle | None = None
        self._open = True
        self._balance = balance
        self._deferred_s = 0.0  # when it last waited for another process
        self._have()
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept)

    def close(self) -> None:
        """Stop accepting. Connections in their TLS handshake are closed; established ones continue."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._listener)
            if self._balance is not None:
                self._balance.have(None)
            if self._pause is not None:
                self._pause.cancel()
            for task, admission in self._tasks.items():
                if admission.close == task.cancel:
                    task.cancel()

    async def wait_closed(self) -> None:
        """Returns at once: the protocol objects end their own connections."""

    def close_all(self, numbers: list[int]) -> None:
        """Close these connections to make room for others."""
        for number in numbers:
            found = self._admitted.get(number)
            if found is not None:
                rare.warning("room", "connections that wait for their clients are closed, to take others")
                found.close()

    def forget(self, number: int) -> None:
        """Free the budget entry of a closed connection."""
        self.budget.closed(number)
        self._admitted.pop(number, None)
        self._have()

    def _have(self) -> None:
        if self._balance is not None and self._open:
            self._balance.have(self.budget.open)

    def _defers(self) -> bool:
        """Whether another process is to accept first; not twice in a row."""
        if self._balance is None or self._balance.is_mine():
            return False
        now = self._loop.time()
        has_waited = now - self._deferred_s < 2 * DEFER_S
        self._deferred_s = 0.0 if has_waited else now
        return not has_waited

    def _accept(self) -> None:
        for _ in range(ACCEPTED_WHILE_BUSY if self._busy() else ACCEPTED_AT_ONCE):
            if self._defers():
                self._pause_for(DEFER_S)
                return
            try:
                client, address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._failed(error)
                return
            self._admit(client, address)
        self._pause_for(WINDOW_S)

    def _failed(self, error: OSError) -> None:
        """After a failed accept: close an idle connection if descriptors or memory ran out, and retry after a pause."""
        rare.warning("accept", "no connection could be accepted: %s", error.strerror or error)
        if error.errno in _NO_ROOM:
            self.close_all(self.budget.make_room())
        self._pause_for(PAUSE_S)

    def _pause_for(self, seconds: float) -> None:
        self._loop.remove_reader(self._listener)
        self._pause = self._loop.call_later(seconds, self._go_on)

    def _go_on(self) -> None:
        if self._open:
            self._loop.add_reader(self._listener, self._accept)

    def _admit(self, client: socket.socket, address: Any) -> None:
        self._serial += 1
        number = self._serial
        host = network_of(address[0]) if isinstance(address, tuple) else "local"
        victims = self.budget.opened(number, host)
        if victims is None:
            self._refuse(client)
            return
        admission = Admission(self, number, host, client.close)
        self._admitted[number] = admission
        self._have()
        self.close_all(victims)
        task = self._loop.create_task(self._connect(client, admission))
        self._tasks[task] = admission
        task.add_done_callback(self._tasks.pop)

    def _refuse(self, client: socket.socket) -> None:
        rare.warning("busy", "a connection was refused: all %d serve requests", self.budget.total)
        with client, contextlib.suppress(OSError):
            client.setblocking(False)
            if self._tls is None:
                client.send(_BUSY)
                client.shutdown(socket.SHUT_WR)

    async def _connect(self, client: socket.socket, admission: Admission) -> None:
        """A connection without TLS is established at once, and closed behind that: uvloop's transport tells its
        protocol nothing when the task is cancelled just then."""
        task = asyncio.current_task()
        assert task is not None
        unwanted = asyncio.Event()
        admission.close = unwanted.set
        more: dict[str, Any] = {}
        if self._tls is not None:
            admission.close = task.cancel
            more = {"ssl_handshake_timeout": self._handshake_timeout_s, "ssl_shutdown_timeout": TLS_CLOSE_S}
        connected = False
        try:
            if self._tls is not None and not self._open:
                return
            client.setblocking(False)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(lambda: self._protocol(admission), client, ssl=self._tls, **more)
            connected = True
            if unwanted.is_set():
                admission.close()
        except OSError as error:  # includes ssl.SSLError: no TLS, no common version, timeout, or the client left
            if self._tls is not None:
                rare.warning("handshake", "a TLS handshake failed: %s", error)
        finally:
            if not connected:
                client.close()
                admission.ended()
