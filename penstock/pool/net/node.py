"""A pool node: serves a pool of this process to other machines over TCP.

Threads: one accepts and greets (`pool.net.greeter`), one watches idle connections (`pool.net.idle`). A connection has
one of its own while messages come, and another while slower work is answered (`pool.net.node_connection`); a few that
have ended with theirs rest, so that the next connection need not start one. One fetcher
finds staging memory for reads of slabs; another one, with half of that memory, for reads of other nodes, so that a slow
node does not delay reads of this one. All are guarded: an exception ends a request or a connection, is logged and
counted, and the node goes on. A node ends when its accepting thread has ended.

Connections are bounded. A connection is ended when it has not sent Hello after GREET_S, when it sends no message for
IDLE_S, and when its host is gone (`wire.set_timeouts`). At most GREETING_MAX connections are without Hello, besides
CONNECTIONS_MAX that have sent it; a source address has a share of both (`core.connection_limits`). A client that is
refused gets the reason.

The pool may have members on other nodes. A node forwards requests of engines to them, and answers
requests of other nodes only from its own members: so a request is forwarded at most once, and nodes may be members of
each other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from penstock.core.connection_limits import ConnectionLimits, ConnectionShares
from penstock.core.keys import KEY_BYTES
from penstock.core.pool.heat import ReadHeat
from penstock.core.spans import SPAN_BYTES_MAX
from penstock.pacing import Pacer
from penstock.pool.api import PoolStat
from penstock.pool.net import wire
from penstock.pool.net.greeter import Greeter
from penstock.pool.net.idle import LOOK_S, IdleConnections
from penstock.pool.net.message_budget import SHARE, MessageBudget
from penstock.pool.net.node_connection import ClientConnection
from penstock.pool.net.one_sided_agent import OneSidedAgent
from penstock.pool.net.pool_connection import PoolConnection
from penstock.pool.net.pool_lending import PoolLending
from penstock.pool.net.secret import Secret
from penstock.pool.net.staging import Staging
from penstock.pool.net.tls import PeerTls
from penstock.pool.net.turns import Turns
from penstock.pool.net.ways import MESSAGES, ONE_SIDED
from penstock.pool.node_backend import NodeBackend
from penstock.process.file_limit import file_limit
from penstock.process.guarded_thread import GuardedThread, GuardedWorker
from penstock.process.kind_counts import KindCounts
from penstock.process.rate_limited_log import RateLimitedLog
from penstock.process.spare_threads import SpareThreads
from penstock.process.switch_interval import switch_often
from penstock.units import format_address

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 4096
GREETING_MAX = 512  # connections that have not sent Hello
BACKLOG = 1024
QUESTIONS_AT_ONCE = 2  # control requests answered at the same time from members of this process
FETCHES_MAX = 4096
STAGING_BYTES = 128 << 20  # initial size, when none is configured
STAGING_BYTES_MAX = STAGING_BYTES + 2 * wire.PAYLOAD_BYTES_MAX  # limit of growth then: two more of the largest blocks


class PoolNode:
    """Listens once constructed; `address` has the real port. The caller still owns the pool, and closes it after
    `close`."""

    greeting_share = 0.5  # of one thread's time, for greetings
    message_share = SHARE  # of one thread's time, for messages that move no block (`message_budget`)

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
        one_sided: OneSidedAgent | None = None,
        siblings: Sequence[int] = (),
    ) -> None:
        """`pace_bytes_per_s` limits the blocks sent over all connections together, to emulate a NIC of that speed.
        `staging_capacity_bytes` bounds staging memory, and with it the largest block; None: STAGING_BYTES, and more
        when a larger block arrives. With a `secret` only clients that prove it are served, with `tls` only those with a
        certificate of its CA. `connections`: clients' connections served at the same time (None: CONNECTIONS_MAX);
        `connections_per_address`: of one address (None: half of them); fewer when the process may not have enough files
        open. `one_sided`: the agent with which the pool's memory is registered, so that clients can read it.
        `siblings`: ports of the node's other processes, which clients are told.

        Raises OSError when the address cannot be bound or the memory cannot be allocated.
        """
        switch_often()
        self.name = name
        self.pool = pool
        self.secret = secret
        self.tls = tls
        self.siblings = siblings
        self.node_id = pool.node_id or os.urandom(wire.NODE_ID_BYTES)
        self.pacer = Pacer(pace_bytes_per_s) if pace_bytes_per_s else None
        limit_bytes = STAGING_BYTES_MAX if staging_capacity_bytes is None else None
        self.staging = Staging(staging_capacity_bytes or STAGING_BYTES, limit_bytes, pool.register)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self.place = format_address(*self.address)
        self.pool_lending = PoolLending(pool, one_sided, staging_capacity_bytes) if one_sided is not None else None
        self._bytes_sent, self._bytes_received = KindCounts(), KindCounts()
        self._heat: ReadHeat | None = None  # from the first read on that is counted
        self._heat_lock = threading.Lock()
        self.rare = RateLimitedLog(log)  # for events that a peer can cause without limit
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
        self._shares: ConnectionShares[ClientConnection] = ConnectionShares(limits)  # strangers have not sent Hello
        self._closed = False
        self._begin_s: float | None = None  # since when the latest connection is being started
        self.idle = IdleConnections()
        self.spare_threads = SpareThreads("penstock-node-connection")
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
        if self.pool_lending is not None:
            self.pool_lending.close(max(0.1, deadline_s - time.monotonic()))
        self.idle.close(max(0.0, deadline_s - time.monotonic()) + LOOK_S)
        self.spare_threads.close()

    @property
    def alive(self) -> bool:
        """Whether all threads that every client needs run; True once closed."""
        threads = (self._thread, self.idle, self._fetcher, self._remote_fetcher)
        return self._closed or all(thread.alive for thread in threads)

    @property
    def one_sided(self) -> str:
        """The transport with which clients may read one-sided; empty: none."""
        return self.pool_lending.kind if self.pool_lending is not None else ""

    def note_sent(self, size_bytes: int) -> None:
        """Count the bytes of a block that was sent in messages."""
        self._bytes_sent.add(MESSAGES, size_bytes)

    def note_received(self, size_bytes: int) -> None:
        """Count the bytes of blocks that came in messages and were stored."""
        self._bytes_received.add(MESSAGES, size_bytes)

    def note_reads(self, keys: bytes, read: Sequence[int]) -> list[int]:
        """Of these blocks (16 bytes of key each), count a read of those with the numbers in `read`; returns the numbers
        of those that clients together read so often that a copy pays. A node that takes no copies counts nothing."""
        if not self.pool.takes_copies:
            return []
        some = [keys[at * KEY_BYTES : (at + 1) * KEY_BYTES] for at in read]
        with self._heat_lock:
            heat = self._heat = self._heat or ReadHeat()
            return [read[number] for number in heat.read(some, time.monotonic())]

    def with_ways(self, stat: PoolStat) -> PoolStat:
        """The pool's state with the ways by which this node's blocks travel to clients."""
        lending = self.pool_lending
        sent = [(MESSAGES, self._bytes_sent.so_far().get(MESSAGES, 0))]
        received = [(MESSAGES, self._bytes_received.so_far().get(MESSAGES, 0))]
        state = ""
        if lending is not None:
            state = lending.state
            sent.append((ONE_SIDED, lending.lent_bytes))
            received.append((ONE_SIDED, lending.grants.written_bytes if lending.grants is not None else 0))
        return replace(stat, sent_bytes_by=tuple(sent), received_bytes_by=tuple(received), one_sided=state)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def strangers_max(self) -> int:
        """Limit of open connections that have not sent Hello."""
        return self._shares.limits.strangers

    @property
    def connections(self) -> int:
        """Open connections, including those that have not sent Hello."""
        return self._shares.peers + self._shares.strangers

    @property
    def beginning_s(self) -> float:
        """Seconds for which a connection has waited for its threads to start. When memory is short, Python may wait for
        ever for a thread that ended before it began."""
        begin_s = self._begin_s
        return time.monotonic() - begin_s if begin_s is not None else 0.0

    def block_bytes_max(self, pool: NodeBackend) -> int:
        """The largest block of `pool` that can be written here, and read."""
        staged = self.staging.largest_bytes(shared=pool.own is not pool)
        return min(staged, pool.block_bytes_max, wire.PAYLOAD_BYTES_MAX)

    def span_bytes_max(self, pool: NodeBackend) -> int:
        """The bytes of blocks of `pool` that can be read or written in one message: two of them fit a connection's
        share of staging memory."""
        return min(SPAN_BYTES_MAX, self.staging.span_bytes_max(shared=pool.own is not pool))

    def later(self, remote: bool, fetch: Callable[[], None], failed: Callable[[Exception], None]) -> bool:
        """Queue a load on a fetcher thread; False when too many wait."""
        return (self._remote_fetcher if remote else self._fetcher).put(fetch, failed)

    def pause_after(self, source: str, cost_s: float) -> float:
        """Charge an address; returns the seconds for which its connection must not read a further message
        (`message_budget`)."""
        with self._budget_lock:
            return self._budget.used(source, cost_s, time.monotonic())

    def pause_of(self, source: str) -> float:
        """Seconds for which a new connection of that address must not read a message."""
        with self._budget_lock:
            return self._budget.used(source, 0.0, time.monotonic())

    def connection_of(self, sock: socket.socket, peer: str) -> ClientConnection:
        """Make the object that serves an accepted connection."""
        return PoolConnection(self, sock, peer)

    def came(self, connection: ClientConnection) -> ClientConnection | None:
        """Register an accepted connection; returns the connection without Hello that must be ended for it, if any."""
        with self._lock:
            return self._shares.came(connection, connection.source)

    def too_many(self) -> ClientConnection | None:
        """The connection without Hello that must be ended when no more can be accepted, if any."""
        with self._lock:
            return self._shares.displaced()

    def greeted(self, connection: ClientConnection) -> str | None:
        """Register a connection's Hello; returns why it is not served, or None."""
        with self._lock:
            return "is closing" if self._closed else self._shares.proved(connection)

    def left(self, connection: ClientConnection) -> None:
        """Unregister a connection that has ended."""
        with self._lock:
            self._shares.left(connection)

    def begin(self, connection: ClientConnection) -> None:
        """Serve a connection that has greeted; when memory or threads are short, only that one is refused."""
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
