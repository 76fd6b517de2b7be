"""A pool node: serves a pool of this process to other machines over TCP.

Threads: one accepts; each connection has one that reads requests (and sends memory blocks straight from the member) and
one that sends what slower work has finished; a fetcher feeds reads of slabs with staging memory, and another one, with
half of it, reads of other nodes: a slow node does not hold up what this one has. Each of them is guarded: an exception
costs a request or a connection, is logged and counted, and the node goes on; one without its accepting thread ends.

Places are few, and come back: a connection that has not said Hello after GREET_S, or sends no message for IDLE_S, is
ended; so is one whose host is gone (`wire.set_timeouts`). At most GREETING_MAX connections have not said Hello, and
the oldest of them leaves for a new one. A client that comes when CONNECTIONS_MAX are open is told so.

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
from functools import partial

from penstock.core.keys import BlockKey
from penstock.guarded_thread import GuardedThread, GuardedWorker
from penstock.pool.api import PoolError
from penstock.pool.checksum import block_checksum
from penstock.pool.losses import note_loss
from penstock.pool.served import OpenedBlock, ServedPool
from penstock.rate_limited_log import RateLimitedLog
from penstock.transport import lanes, wire
from penstock.transport.pacer import PIECE_BYTES, Pacer
from penstock.transport.secret import Secret, SecretRefused, prove_as_server
from penstock.transport.staging import Slot, Staging
from penstock.units import format_address, format_bytes

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 256
GREETING_MAX = 64  # connections that have not said Hello
IN_FLIGHT_MAX = 128  # loads and writes of one connection that are not answered yet
FETCHES_MAX = 4096
STAGING_BYTES = 128 << 20  # at first, where nobody says how much
STAGING_BYTES_MAX = STAGING_BYTES + 2 * wire.PAYLOAD_BYTES_MAX  # what it may grow to then: two of the largest blocks
SENDS_MAX = 4 * IN_FLIGHT_MAX
SENDER_END_S = 3.0 * wire.STALL_S  # what is being sent ends with the socket
PAYLOAD_S = 30.0  # for a payload whose request has less time than this, and for what a client takes after its deadline
_DRAIN_BYTES = 1 << 20
_PROBE = bytes(wire.PROBE_BYTES_MAX)


class PoolNode:
    """Listens from construction on; `address` is the real one. The pool stays the caller's to close, after `close`."""

    def __init__(
        self,
        pool: ServedPool,
        host: str,
        port: int,
        name: str = "pool",
        pace_bytes_per_s: float | None = None,
        staging_capacity_bytes: int | None = None,
        secret: Secret | None = None,
    ) -> None:
        """`pace_bytes_per_s` limits the blocks sent over all connections together, to emulate a NIC of that speed.
        `staging_capacity_bytes` bounds staging memory, and with it the largest block; None: STAGING_BYTES, and more
        once a larger block comes. With a `secret` only clients that prove it get anything.

        Raises OSError when the address or the memory cannot be had.
        """
        self.name = name
        self.pool = pool
        self.secret = secret
        self.node_id = pool.node_id or os.urandom(wire.NODE_ID_BYTES)
        self.pacer = Pacer(pace_bytes_per_s) if pace_bytes_per_s else None
        limit_bytes = STAGING_BYTES_MAX if staging_capacity_bytes is None else None
        self.staging = Staging(staging_capacity_bytes or STAGING_BYTES, limit_bytes, pool.register)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=128)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self.place = format_address(*self.address)
        self.seldom = RateLimitedLog(log)  # for what a peer can cause as often as it likes
        self._lock = threading.Lock()
        self._connections: set[Served] = set()  # that said Hello
        self._greeting: dict[Served, None] = {}  # that did not yet, the oldest first
        self._closed = False
        self._begin_s: float | None = None  # since when the connection that came last is being begun
        self._fetcher = GuardedWorker("penstock-node-fetch", FETCHES_MAX)
        self._far_fetcher = GuardedWorker("penstock-node-far-fetch", FETCHES_MAX)
        self._thread = GuardedThread("penstock-node-accept", self._accept, restarts=True)
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop listening, end every connection, stop the threads."""
        with self._lock:
            self._closed = True
            connections = [*self._connections, *self._greeting]
        deadline_s = time.monotonic() + timeout_s
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.staging.close()
        for connection in connections:
            connection.cut()
        for fetcher in (self._fetcher, self._far_fetcher):
            fetcher.close(max(0.0, deadline_s - time.monotonic()))
        self._thread.join(max(0.0, deadline_s - time.monotonic()))
        for connection in connections:
            connection.join(max(0.0, deadline_s - time.monotonic()))

    @property
    def alive(self) -> bool:
        """Whether the threads without which it serves nobody run, or it was closed."""
        threads = (self._thread, self._fetcher, self._far_fetcher)
        return self._closed or all(thread.alive for thread in threads)

    @property
    def connections(self) -> int:
        """How many are open, those that did not say Hello included."""
        return len(self._connections) + len(self._greeting)

    @property
    def beginning_s(self) -> float:
        """For how long a connection has been waiting for its threads. Where memory is short, Python may wait for a
        thread for ever that ended before it began."""
        begin_s = self._begin_s
        return time.monotonic() - begin_s if begin_s is not None else 0.0

    def block_bytes_max(self, pool: ServedPool) -> int:
        """The largest block of `pool` that can be written here, and read."""
        staged = self.staging.largest_bytes(shared=pool.own is not pool)
        return min(staged, pool.block_bytes_max, wire.PAYLOAD_BYTES_MAX)

    def later(self, far: bool, fetch: Callable[[], None], failed: Callable[[Exception], None]) -> bool:
        """Queue a load for a fetcher; False when too many wait."""
        return (self._far_fetcher if far else self._fetcher).put(fetch, failed)

    def connection_of(self, sock: socket.socket, peer: str) -> Served:
        """What serves a connection that was accepted."""
        return Served(self, sock, peer)

    def greeted(self, connection: Served) -> bool:
        """The connection said Hello; False when as many as may be are open."""
        with self._lock:
            if connection in self._connections:
                return True
            if self._closed or connection not in self._greeting or len(self._connections) >= CONNECTIONS_MAX:
                return False
            del self._greeting[connection]
            self._connections.add(connection)
            return True

    def left(self, connection: Served) -> None:
        with self._lock:
            self._connections.discard(connection)
            self._greeting.pop(connection, None)

    def _accept(self) -> None:
        self._begin_s = None
        while not self._closed:
            try:
                sock, peer = self._listener.accept()
            except OSError as error:
                if not self._closed:
                    self.seldom.warning("accept", "a connection could not be accepted: %s", error)
                    time.sleep(0.05)
                continue
            self._begin_s = time.monotonic()
            try:
                self._begin(sock, f"{peer[0]}:{peer[1]}")
            except Exception:
                sock.close()
                raise
            finally:
                self._begin_s = None

    def _begin(self, sock: socket.socket, peer: str) -> None:
        """Serve a connection; where memory or threads are short, only that connection is refused."""
        oldest: Served | None = None
        connection: Served | None = None
        try:
            connection = self.connection_of(sock, peer)
            with self._lock:
                if self._closed:
                    connection.abandon()
                    return
                if len(self._greeting) >= GREETING_MAX:
                    oldest = next(iter(self._greeting))
                    del self._greeting[oldest]
                self._greeting[connection] = None
            connection.start()
        except (RuntimeError, MemoryError) as error:
            self.seldom.warning("begin", "connection of %s refused: %s", peer, error or "out of memory")
            if connection is not None:
                self.left(connection)
                connection.abandon()
            sock.close()
        if oldest is not None:
            self.seldom.warning("greeting", "connection of %s ended: %d have not said Hello", oldest.peer, GREETING_MAX)
            oldest.cut()


class _Staged:
    """A request of a connection that is under way, with its staging memory and, for a read, its block: all of it is
    given back once, by whoever comes first to the end."""

    def __init__(self, connection: Served, slot: Slot | None = None, opened: OpenedBlock | None = None) -> None:
        self._leave: Callable[[], None] | None = connection.leave
        self.slot = slot
        self._opened = opened

    def end(self) -> None:
        leave, self._leave = self._leave, None
        if leave is None:
            return
        if self.slot is not None:
            self.slot.give()
        if self._opened is not None:
            self._opened.release()
        leave()


class Served:
    """One connection at the node."""

    def __init__(self, node: PoolNode, sock: socket.socket, peer: str) -> None:
        """Raises RuntimeError or MemoryError where a thread cannot be had."""
        self._node = node
        self._pool: ServedPool = node.pool
        self._sock = sock
        self.peer = peer
        self._send_lock = threading.Lock()
        self._count_lock = threading.Lock()
        self._in_flight = 0
        self._greet_by_s = 0.0
        self._sent_s = 0.0  # when the last paced block left
        self._ended = False  # nothing can be sent any more
        self._reader = GuardedThread(f"penstock-node-{peer}", self._serve, kind="penstock-node-connection")
        self._sender = GuardedWorker(f"penstock-send-{peer}", SENDS_MAX, kind="penstock-node-send")

    def start(self) -> None:
        """Raises RuntimeError or MemoryError where the thread cannot be had; `abandon` must follow then."""
        self._reader.start()

    def abandon(self) -> None:
        """End a connection that was not started."""
        self._sender.stop()
        self.cut()
        self._sock.close()

    def cut(self) -> None:
        """End the connection; both threads notice."""
        self._ended = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def join(self, timeout_s: float) -> None:
        self._reader.join(timeout_s)

    def _serve(self) -> None:
        try:
            self._greet()
            self._serve_requests()
        except (wire.ProtocolError, SecretRefused) as error:
            self._node.seldom.warning(str(error), "connection of %s closed: %s", self.peer, error)
        except TimeoutError as error:
            self._node.seldom.warning(str(error), "connection of %s ended: %s", self.peer, error)
        except OSError as error:
            log.debug("connection of %s ended: %s", self.peer, error)
        finally:
            self.cut()
            self._sender.stop()  # what ends from now on is given back where it ends
            self._sender.join(SENDER_END_S)
            self._sock.close()
            self._node.left(self)

    def _greet(self) -> None:
        """Versions, secret; GREET_S are left for all of it, up to the end of the first message."""
        self._greet_by_s = time.monotonic() + wire.GREET_S
        wire.set_timeouts(self._sock)
        first = bytearray(wire.GREETING.size)
        wire.receive_exactly(self._sock, memoryview(first), until_s=self._greet_by_s)
        secret = self._node.secret
        self._sock.sendall(wire.greeting(secret is not None))
        wire.check_greeting(first, secret is not None)
        if secret is not None:
            prove_as_server(self._sock, secret, wire.SECRET_PURPOSE)

    def _serve_requests(self) -> None:
        frames = wire.FrameReader(self._sock)
        idle_s = wire.GREET_S
        until_s: float | None = self._greet_by_s
        while True:
            asked_s = time.monotonic()
            header, payload_bytes = frames.next(idle_s, until_s)
            now_s = time.monotonic()
            request = wire.decode_request(header)
            if payload_bytes and not isinstance(request, wire.Write):
                raise wire.ProtocolError("only Write has a payload")
            if until_s is not None:
                if not isinstance(request, wire.Hello):
                    raise wire.ProtocolError(f"the first message is {type(request).__name__}, not Hello")
                idle_s, until_s = wire.IDLE_S, None
            # A request that was there already became ready while the link was busy with the one before.
            ready_s = min(now_s, self._sent_s) if now_s - asked_s < 0.0001 else now_s
            self._answer(request, payload_bytes, ready_s)

    def _answer(self, request: wire.Request, payload_bytes: int, ready_s: float) -> None:
        match request:
            case wire.Read():
                self._read(request, ready_s)
            case wire.Write():
                self._write(request, payload_bytes)
            case wire.Lookup(id) | wire.Evict(id) | wire.Stat(id):
                try:
                    self._reply(self._control(request))
                except PoolError as error:
                    self._reply(wire.Failed(id, error.reason, error.detail))
            case wire.Corrupt(key, checksum):
                self._pool.discard(key, checksum)
            case wire.Alive():
                pass  # that it came is all it says
            case wire.Probe():
                self._probe(request, ready_s)
            case wire.Hello():
                self._greeted(request)
            case wire.Open(id) | wire.HandedOver(id) | wire.Attach(id) | wire.Lend(id) | wire.Offer(id):
                self._reply(wire.Failed(id, "layout", "this is a pool node, not the relay of a decode engine"))

    def _greeted(self, hello: wire.Hello) -> None:
        """Raises ProtocolError for a client that this node has nothing for."""
        if hello.origin or hello.own_only:
            own = self._node.pool.own
            if own is None:
                self._reply(wire.Failed(0, "network", "the node has no members of its own, and is asked for these"))
                raise wire.ProtocolError("asked for members of its own, which this node does not have")
            self._pool = own
        if not self._node.greeted(self):
            here = format_address(*self._sock.getsockname()[:2])
            refusal = f"node {here} has {CONNECTIONS_MAX} connections, the limit"
            self._reply(wire.Failed(0, "network", refusal))
            raise wire.ProtocolError(refusal)
        lanes.mark(self._sock, self._is_urgent(hello.lane))
        rate, block_bytes_max = self._pool.read_bytes_per_s, self._node.block_bytes_max(self._pool)
        self._reply(wire.Ready(self._node.name, self._node.node_id, rate, block_bytes_max, wire.IDLE_S))

    def _is_urgent(self, lane: str) -> bool:
        return lane == "control"

    def _control(self, request: wire.Lookup | wire.Evict | wire.Stat) -> wire.Reply:
        """Raises PoolError when the pool cannot be asked."""
        if isinstance(request, wire.Stat):
            return wire.Stats(request.id, self._pool.stat(request.timeout_s))
        keys = wire.split_keys(request.keys)
        if isinstance(request, wire.Evict):
            return wire.Evicted(request.id, self._pool.evict(keys))
        routes: dict[tuple[str, ...], int] = {}
        sizes, members = [], []
        for hit in self._pool.lookup(keys, request.timeout_s):
            sizes.append(hit.size_bytes if hit else 0)
            members.append(routes.setdefault(hit.route, len(routes)) if hit else 0)
        return wire.Found(request.id, sizes, members, [list(route) for route in routes])

    def _probe(self, request: wire.Probe, ready_s: float) -> None:
        if not 0 < request.size_bytes <= wire.PROBE_BYTES_MAX:
            detail = f"a probe of {request.size_bytes} bytes; 1 to {wire.PROBE_BYTES_MAX} are allowed"
            self._reply(wire.Failed(request.id, "layout", detail))
            return
        # Not from the staging memory: that holds blocks of tenants.
        data = memoryview(_PROBE)[: request.size_bytes]
        self._send(wire.frame(wire.Probed(request.id), len(data)), data, ready_s, ready_s)

    # --- reads ---

    def _read(self, request: wire.Read, ready_s: float) -> None:
        deadline_s = time.monotonic() + request.timeout_s
        opened = self._pool.open_block(request.key, request.size_bytes)
        if isinstance(opened, PoolError):
            self._reply(wire.Failed(request.id, opened.reason, opened.detail))
        elif opened.view is not None:
            try:
                self._send_block(request.id, opened.key, opened.checksum, opened.view, deadline_s, ready_s)
                opened.note_read()
            finally:
                opened.release()
        elif not self._enter():
            opened.release()
            self._lost("read_dropped", f"{IN_FLIGHT_MAX} requests of its connection wait already")
            self._reply(wire.Failed(request.id, "dropped", f"{IN_FLIGHT_MAX} requests of this connection wait already"))
        else:
            self._fetch(request, opened, deadline_s)

    def _fetch(self, request: wire.Read, opened: OpenedBlock, deadline_s: float) -> None:
        staged = _Staged(self, opened=opened)

        def failed(error: Exception) -> None:
            self._later(partial(self._fail_fetch, request.id, staged, "device", f"the node failed: {error!r}"))

        if not self._node.later(opened.far, partial(self._fetch_block, request, opened, staged, deadline_s), failed):
            self._fail_fetch(request.id, staged, "dropped", "too many reads wait in this node")

    def _fetch_block(self, request: wire.Read, opened: OpenedBlock, staged: _Staged, deadline_s: float) -> None:
        """On the fetcher's thread: find staging memory, let the member read into it."""
        slot = self._node.staging.take(request.size_bytes, deadline_s, shared=opened.far)
        if slot is None:
            in_time, detail = self._no_staging(request.size_bytes, shared=opened.far)
            self._later(partial(self._fail_fetch, request.id, staged, "deadline" if in_time else "dropped", detail))
            return
        staged.slot = slot

        def loaded(error: PoolError | None) -> None:
            self._later(partial(self._finish_fetch, request, opened, staged, slot.view, deadline_s, error))

        opened.load(slot.view, deadline_s - time.monotonic(), loaded)

    def _no_staging(self, size_bytes: int, shared: bool) -> tuple[bool, str]:
        """Whether only time was missing for a slot, and what there was not."""
        at_most = self._node.staging.largest_bytes(shared)
        if size_bytes > at_most:
            return False, f"blocks of {format_bytes(size_bytes)} do not fit staging memory, at most {at_most} bytes do"
        return True, f"no staging memory for {format_bytes(size_bytes)} in time"

    def _fail_fetch(self, id: int, staged: _Staged, reason: str, detail: str) -> None:
        staged.end()
        self._lost(f"read_{reason}", detail)
        self._reply(wire.Failed(id, reason, detail))

    def _finish_fetch(
        self,
        request: wire.Read,
        opened: OpenedBlock,
        staged: _Staged,
        view: memoryview,
        deadline_s: float,
        error: PoolError | None,
    ) -> None:
        """On the sender's thread: send what was read, give everything back."""
        try:
            if error is not None:
                self._reply(wire.Failed(request.id, error.reason, error.detail))
            else:
                data = view[: request.size_bytes]
                self._send_block(request.id, opened.key, opened.checksum, data, deadline_s, time.monotonic())
        finally:
            staged.end()

    def _lost(self, kind: str, detail: str) -> None:
        """A request of this client comes to nothing, for a reason of the node's own."""
        note_loss(kind, self._node.place, "node %s: a request of %s ended: %s", self._node.place, self.peer, detail)

    def _send_block(
        self, id: int, key: BlockKey, checksum: int, data: memoryview, deadline_s: float, ready_s: float
    ) -> None:
        if time.monotonic() > deadline_s:
            self._lost("read_deadline", "the node came to it too late")
            self._reply(wire.Failed(id, "deadline", "the node came to it too late"))
            return
        self._send(wire.frame(wire.Block(id, key, checksum), len(data)), data, ready_s, deadline_s)

    def _send(self, head: bytes, data: memoryview, ready_s: float, deadline_s: float) -> None:
        """Send at the node's pace what was ready at `ready_s`; a client has given it up soon after `deadline_s`."""
        pacer, until_s = self._node.pacer, max(deadline_s, time.monotonic()) + PAYLOAD_S
        self._check_open()
        with self._send_lock:
            if pacer is None:
                wire.send_all(self._sock, head, data, until_s=until_s)
                return
            for at in range(0, len(data), PIECE_BYTES):
                piece = data[at : at + PIECE_BYTES]
                self._check_open()
                self._sent_s = pacer.wait(len(piece), ready_s)
                wire.send_all(self._sock, b"" if at else head, piece, until_s=until_s)

    # --- writes ---

    def _write(self, request: wire.Write, payload_bytes: int) -> None:
        if payload_bytes != request.size_bytes:
            raise wire.ProtocolError(f"write of {request.size_bytes} bytes with a payload of {payload_bytes}")
        deadline_s = time.monotonic() + request.timeout_s
        if not self._enter():
            refusal = "dropped", f"{IN_FLIGHT_MAX} requests of this connection wait already"
            self._refuse_write(request.id, payload_bytes, *refusal)
            return
        slot = self._node.staging.take(payload_bytes, deadline_s)
        if slot is None:
            self.leave()
            in_time, detail = self._no_staging(payload_bytes, shared=False)
            self._refuse_write(request.id, payload_bytes, "dropped" if in_time else "full", detail)
            return
        staged = _Staged(self, slot)
        try:
            self._store(request, staged, slot.view, deadline_s)
        except BaseException:
            staged.end()
            raise

    def _store(self, request: wire.Write, staged: _Staged, view: memoryview, deadline_s: float) -> None:
        """Receive the payload, and have the pool store it; `staged` ends with that."""
        data = view[: request.size_bytes]
        wire.receive_exactly(self._sock, data, until_s=max(deadline_s, time.monotonic() + PAYLOAD_S))
        if block_checksum(request.key, data) != request.checksum:
            staged.end()
            self._lost("write_checksum", f"block {request.key.hex()} was damaged on its way here")
            self._reply(wire.Failed(request.id, "checksum", f"block {request.key.hex()} was damaged on its way here"))
            return

        def stored(error: PoolError | None) -> None:
            staged.end()
            reply = wire.Failed(request.id, error.reason, error.detail) if error else wire.Written(request.id)
            self._later(partial(self._reply, reply))

        self._pool.write(request.block, view, deadline_s - time.monotonic(), stored)

    def _refuse_write(self, id: int, payload_bytes: int, reason: str, detail: str) -> None:
        self._lost(f"write_{reason}", detail)
        self._drain(payload_bytes)
        self._reply(wire.Failed(id, reason, detail))

    def _drain(self, size_bytes: int) -> None:
        scratch, until_s = memoryview(bytearray(min(size_bytes, _DRAIN_BYTES))), time.monotonic() + 2 * PAYLOAD_S
        while size_bytes:
            part = scratch[: min(size_bytes, len(scratch))]
            wire.receive_exactly(self._sock, part, until_s=until_s)
            size_bytes -= len(part)

    # --- sending ---

    def _check_open(self) -> None:
        """Raises ConnectionError once the connection is being ended: whoever sends then must not wait for others."""
        if self._ended:
            raise ConnectionError("the connection is ended")

    def _reply(self, message: wire.Reply) -> None:
        self._check_open()
        with self._send_lock:
            wire.send_all(self._sock, wire.frame(message), until_s=time.monotonic() + PAYLOAD_S)

    def _later(self, send: Callable[[], None]) -> None:
        """Have the sender's thread send something. It also gives slots and pins back, so it runs in any case: here and
        now, without sending, when the connection has ended or takes nothing any more."""
        if not self._sender.put(partial(self._try, send), self._failed):
            self.cut()
            try:
                self._try(send)
            except Exception as error:
                self._failed(error)

    def _try(self, send: Callable[[], None]) -> None:
        try:
            send()
        except OSError as error:
            log.debug("connection of %s ended: %s", self.peer, error)
            self.cut()

    def _failed(self, error: Exception) -> None:
        log.error("connection of %s failed: %r", self.peer, error)
        self.cut()

    def _enter(self) -> bool:
        with self._count_lock:
            self._in_flight += 1
            if self._in_flight <= IN_FLIGHT_MAX:
                return True
            self._in_flight -= 1
            return False

    def leave(self) -> None:
        """A request that `_enter` let in has ended."""
        with self._count_lock:
            self._in_flight -= 1
