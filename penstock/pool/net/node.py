"""A pool node: serves a pool of this process to other machines over TCP.

Threads: one accepts and greets (`transport.greeter`); each connection has two of its own once it has said Hello
(`transport.node_connection`), and before that none; a fetcher feeds reads of slabs with staging memory, and another
one, with half of it, reads of other nodes: a slow node does not hold up what this one has. Each of them is guarded: an
exception costs a request or a connection, is logged and counted, and the node goes on; one without its accepting thread
ends.

Connections are bounded: one that has not said Hello after GREET_S, or sends no message for IDLE_S, is ended; so is one
whose host is gone (`wire.set_timeouts`). At most GREETING_MAX connections have not said Hello, apart from the
CONNECTIONS_MAX that have; a source address has a share of both (`core.connection_limits`). A client that finds no place
is told so.

The pool may have members of other nodes. A node asks them on behalf of engines, and is itself asked by other nodes:
these get what its own members hold and nothing else, so that no request ever goes further than one node, and nodes may
name each other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable

from penstock.core.connection_limits import ConnectionLimits, ConnectionShares
from penstock.pacing import Pacer
from penstock.pool.net import wire
from penstock.pool.net.greeter import Greeter
from penstock.pool.net.message_budget import SHARE, MessageBudget
from penstock.pool.net.node_connection import ClientConnection
from penstock.pool.net.pool_connection import PoolConnection
from penstock.pool.net.secret import Secret
from penstock.pool.net.staging import Staging
from penstock.pool.net.tls import PeerTls
from penstock.pool.net.turns import Turns
from penstock.pool.node_backend import NodeBackend
from penstock.process.file_limit import file_limit
from penstock.process.guarded_thread import GuardedThread, GuardedWorker
from penstock.process.rate_limited_log import RateLimitedLog
from penstock.process.switch_interval import switch_often
from penstock.units import format_address

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 1024
GREETING_MAX = 512  # connections that have not said Hello
BACKLOG = 1024
QUESTIONS_AT_ONCE = 2  # lookups and the like that are being answered by members of this process
FETCHES_MAX = 4096
STAGING_BYTES = 128 << 20  # at first, where nobody says how much
STAGING_BYTES_MAX = STAGING_BYTES + 2 * wire.PAYLOAD_BYTES_MAX  # what it may grow to then: two of the largest blocks


class PoolNode:
    """Listens from construction on; `address` is the real one. The pool stays the caller's to close, after `close`."""

    greeting_share = 0.5  # of a thread's time, for greetings
    message_share = SHARE  # and for messages that move no block (`message_budget`)

    def __init__(
        self,
        pool: NodeBackend,
        host: str,
        port: int,
        name: str = "pool",
        pace_bytes_per_s: float | None = None,
        staging_capacity_bytes: int | None = None,
        secret: Secret | None = None,
        connections: int | None = None,
        connections_per_address: int | None = None,
        tls: PeerTls | None = None,
    ) -> None:
        """`pace_bytes_per_s` limits the blocks sent over all connections together, to emulate a NIC of that speed.
        `staging_capacity_bytes` bounds staging memory, and with it the largest block; None: STAGING_BYTES, and more
        once a larger block comes. With a `secret` only clients that prove it get anything, with `tls` only those with a
        certificate of its CA. `connections` of clients are served at once (None: CONNECTIONS_MAX),
        `connections_per_address` of one address (None: half of them); fewer where the process may have too few files
        open.

        Raises OSError when the address or the memory cannot be had.
        """
        switch_often()
        self.name = name
        self.pool = pool
        self.secret = secret
        self.tls = tls
        self.node_id = pool.node_id or os.urandom(wire.NODE_ID_BYTES)
        self.pacer = Pacer(pace_bytes_per_s) if pace_bytes_per_s else None
        limit_bytes = STAGING_BYTES_MAX if staging_capacity_bytes is None else None
        self.staging = Staging(staging_capacity_bytes or STAGING_BYTES, limit_bytes, pool.register)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self.place = format_address(*self.address)
        self.rare = RateLimitedLog(log)  # for what a peer can cause as often as it likes
        self.turns = Turns(QUESTIONS_AT_ONCE)
        self._budget = MessageBudget(self.message_share)
        self._budget_lock = threading.Lock()
        wanted = CONNECTIONS_MAX if connections is None else connections
        limits = ConnectionLimits.within(file_limit(), GREETING_MAX, wanted, connections_per_address)
        if limits.peers < wanted:
            log.warning(
                "this process may have %d files open: %d connections are served, not %d; allowed: a higher hard limit "
                "(ulimit -Hn)", file_limit(), limits.peers, wanted,
            )  # fmt: skip
        self._lock = threading.Lock()
        self._shares: ConnectionShares[ClientConnection] = ConnectionShares(limits)  # strangers: that did not say Hello
        self._closed = False
        self._begin_s: float | None = None  # since when the connection that came last is being begun
        self._fetcher = GuardedWorker("penstock-node-fetch", FETCHES_MAX)
        self._remote_fetcher = GuardedWorker("penstock-node-far-fetch", FETCHES_MAX)
        self._thread = GuardedThread("penstock-node-accept", self._accept, restarts=True)
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop listening, end every connection, stop the threads."""
        with self._lock:
            self._closed = True
            connections = self._shares.everybody()
        deadline_s = time.monotonic() + timeout_s
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self.staging.close()
        for connection in connections:
            connection.cut()
        for fetcher in (self._fetcher, self._remote_fetcher):
            fetcher.close(max(0.0, deadline_s - time.monotonic()))
        self._thread.join(max(0.0, deadline_s - time.monotonic()))
        self._listener.close()
        for connection in connections:
            connection.join(max(0.0, deadline_s - time.monotonic()))

    @property
    def alive(self) -> bool:
        """Whether the threads without which it serves nobody run, or it was closed."""
        threads = (self._thread, self._fetcher, self._remote_fetcher)
        return self._closed or all(thread.alive for thread in threads)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def strangers_max(self) -> int:
        """Connections that may be open and have not said Hello."""
        return self._shares.limits.strangers

    @property
    def connections(self) -> int:
        """How many are open, including those that have not said Hello."""
        return self._shares.peers + self._shares.strangers

    @property
    def beginning_s(self) -> float:
        """For how long a connection has been waiting for its threads. Where memory is short, Python may wait for a
        thread for ever that ended before it began."""
        begin_s = self._begin_s
        return time.monotonic() - begin_s if begin_s is not None else 0.0

    def block_bytes_max(self, pool: NodeBackend) -> int:
        """The largest block of `pool` that can be written here, and read."""
        staged = self.staging.largest_bytes(shared=pool.own is not pool)
        return min(staged, pool.block_bytes_max, wire.PAYLOAD_BYTES_MAX)

    def later(self, remote: bool, fetch: Callable[[], None], failed: Callable[[Exception], None]) -> bool:
        """Queue a load for a fetcher; False when too many wait."""
        return (self._remote_fetcher if remote else self._fetcher).put(fetch, failed)

    def pause_after(self, source: str, cost_s: float) -> float:
        """For how long a connection of that address reads no further message (`message_budget`)."""
        with self._budget_lock:
            return self._budget.used(source, cost_s, time.monotonic())

    def pause_of(self, source: str) -> float:
        """For how long a new connection of that address reads no message."""
        with self._budget_lock:
            return self._budget.used(source, 0.0, time.monotonic())

    def connection_of(self, sock: socket.socket, peer: str) -> ClientConnection:
        """What serves a connection that was accepted."""
        return PoolConnection(self, sock, peer)

    def came(self, connection: ClientConnection) -> ClientConnection | None:
        """A connection was accepted; returns the stranger that leaves for it."""
        with self._lock:
            return self._shares.came(connection, connection.source)

    def too_many(self) -> ClientConnection | None:
        """The stranger that leaves where no more can be accepted."""
        with self._lock:
            return self._shares.displaced()

    def greeted(self, connection: ClientConnection) -> str | None:
        """The connection said Hello; or why it is not served."""
        with self._lock:
            return "is closing" if self._closed else self._shares.proved(connection)

    def left(self, connection: ClientConnection) -> None:
        """A connection has ended: its share is free for others."""
        with self._lock:
            self._shares.left(connection)

    def begin(self, connection: ClientConnection) -> None:
        """Serve a connection that has greeted; where memory or threads are short, only that one is refused."""
        self._begin_s = time.monotonic()
        try:
            connection.start()
        except (RuntimeError, MemoryError, OSError) as error:
            if not isinstance(error, OSError):
                self.rare.warning("begin", "connection of %s refused: %s", connection.peer, error or "out of memory")
            self.left(connection)
            connection.abandon()
        finally:
            self._begin_s = None

    def _accept(self) -> None:
        self._begin_s = None
        Greeter(self, self._listener).run()
