"""A pool node: serves a pool of this process to other machines over TCP.

Threads: one accepts; each connection has one that reads requests (and sends memory blocks straight from the member) and
one that sends what slower work has finished; a fetcher feeds reads of slabs with staging memory, and another one, with
half of it, reads of other nodes: a slow node does not hold up what this one has.

The pool may have members of other nodes. A node asks them on behalf of engines, and is itself asked by other nodes:
these get what its own members hold and nothing else, so that no request ever goes further than one node, and nodes may
name each other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from functools import partial

from penstock.core.keys import KEY_BYTES, BlockKey
from penstock.pool.api import PoolError
from penstock.pool.checksum import block_checksum
from penstock.pool.served import OpenedBlock, ServedPool
from penstock.transport import lanes, wire
from penstock.transport.fetcher import Fetcher
from penstock.transport.pacer import PIECE_BYTES, Pacer
from penstock.transport.secret import Secret, SecretRefused, prove_as_server
from penstock.transport.staging import Staging

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 256
IN_FLIGHT_MAX = 128  # loads and writes of one connection that are not answered yet
STAGING_BYTES = 128 << 20
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
        staging_capacity_bytes: int = STAGING_BYTES,
        secret: Secret | None = None,
    ) -> None:
        """`pace_bytes_per_s` limits the blocks sent over all connections together, to emulate a NIC of that speed.
        With a `secret` only clients that prove it get anything.

        Raises OSError when the address cannot be had.
        """
        self.name = name
        self.pool = pool
        self.secret = secret
        self.node_id = pool.node_id or os.urandom(wire.NODE_ID_BYTES)
        self.pacer = Pacer(pace_bytes_per_s) if pace_bytes_per_s else None
        self.staging = Staging(staging_capacity_bytes)
        pool.register(self.staging.memory)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=128)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._lock = threading.Lock()
        self._connections: set[Served] = set()
        self._closed = False
        self._begin_s: float | None = None  # since when the connection that came last is being begun
        self._fetcher, self._far_fetcher = Fetcher("penstock-node-fetch"), Fetcher("penstock-node-far-fetch")
        self._thread = threading.Thread(target=self._accept, name="penstock-node-accept", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop listening, end every connection, stop the threads."""
        with self._lock:
            self._closed = True
            connections = list(self._connections)
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
    def beginning_s(self) -> float:
        """For how long a connection has been waiting for its threads. Where memory is short, Python may wait for a
        thread for ever that ended before it began."""
        begin_s = self._begin_s
        return time.monotonic() - begin_s if begin_s is not None else 0.0

    def later(self, far: bool, fetch: Callable[[], None]) -> bool:
        """Queue a load for a fetcher; False when too many wait."""
        return (self._far_fetcher if far else self._fetcher).put(fetch)

    def connection_of(self, sock: socket.socket, peer: str) -> Served:
        """What serves a connection that was accepted."""
        return Served(self, sock, peer)

    def left(self, connection: Served) -> None:
        with self._lock:
            self._connections.discard(connection)

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, peer = self._listener.accept()
            except OSError as error:
                if not self._closed:
                    log.warning("a connection could not be accepted: %s", error)
                    time.sleep(0.05)
                continue
            self._begin_s = time.monotonic()
            self._begin(sock, f"{peer[0]}:{peer[1]}")
            self._begin_s = None

    def _begin(self, sock: socket.socket, peer: str) -> None:
        """Serve a connection; where memory or threads are short, only that connection is refused."""
        connection: Served | None = None
        try:
            with self._lock:
                if self._closed or len(self._connections) >= CONNECTIONS_MAX:
                    log.warning("connection of %s refused: %d are open", peer, len(self._connections))
                    sock.close()
                    return
                connection = self.connection_of(sock, peer)
                self._connections.add(connection)
            connection.start()
        except (RuntimeError, MemoryError) as error:
            log.warning("connection of %s refused: %s", peer, error or "out of memory")
            if connection is not None:
                self.left(connection)
            sock.close()


class Served:
    """One connection at the node."""

    def __init__(self, node: PoolNode, sock: socket.socket, peer: str) -> None:
        self._node = node
        self._pool: ServedPool = node.pool
        self._sock = sock
        self._peer = peer
        self._send_lock = threading.Lock()
        self._count_lock = threading.Lock()
        self._in_flight = 0
        self._sent_s = 0.0  # when the last paced block left
        self._out: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._serve, name=f"penstock-node-{peer}", daemon=True)
        self._sender = threading.Thread(target=self._send_later, name=f"penstock-send-{peer}", daemon=True)

    def start(self) -> None:
        """Raises RuntimeError or MemoryError where a thread cannot be had; nothing runs then."""
        self._sender.start()
        try:
            self._reader.start()
        except BaseException:
            self._out.put(None)
            raise

    def cut(self) -> None:
        """End the connection; both threads notice."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def join(self, timeout_s: float) -> None:
        if self._reader.is_alive():
            self._reader.join(timeout_s)

    def _serve(self) -> None:
        try:
            wire.set_timeouts(self._sock)
            first = bytearray(wire.GREETING.size)
            wire.receive_exactly(self._sock, memoryview(first))
            secret = self._node.secret
            self._sock.sendall(wire.greeting(secret is not None))
            wire.check_greeting(first, secret is not None)
            if secret is not None:
                prove_as_server(self._sock, secret, wire.SECRET_PURPOSE)
            frames = wire.FrameReader(self._sock)
            while True:
                idle_s = time.monotonic()
                header, payload_bytes = frames.next()
                now_s = time.monotonic()
                request = wire.decode_request(header)
                if payload_bytes and not isinstance(request, wire.Write):
                    raise wire.ProtocolError("only Write has a payload")
                # A request that was there already became ready while the link was busy with the one before.
                ready_s = min(now_s, self._sent_s) if now_s - idle_s < 0.0001 else now_s
                self._answer(request, payload_bytes, ready_s)
        except (wire.ProtocolError, SecretRefused) as error:
            log.warning("connection of %s closed: %s", self._peer, error)
        except OSError as error:
            log.debug("connection of %s ended: %s", self._peer, error)
        except Exception:
            log.exception("connection of %s failed", self._peer)
        finally:
            self.cut()
            self._out.put(None)
            self._sender.join()
            self._sock.close()
            self._node.left(self)

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
        lanes.mark(self._sock, self._is_urgent(hello.lane))
        self._reply(wire.Ready(self._node.name, self._node.node_id, self._pool.read_bytes_per_s))

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
        self._send(wire.frame(wire.Probed(request.id), len(data)), data, ready_s)

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
            self._reply(wire.Failed(request.id, "dropped", f"{IN_FLIGHT_MAX} requests of this connection wait already"))
        elif not self._node.later(opened.far, partial(self._fetch_block, request, opened, deadline_s)):
            self._fail_fetch(request.id, opened, "dropped", "too many reads wait in this node")

    def _fetch_block(self, request: wire.Read, opened: OpenedBlock, deadline_s: float) -> None:
        """On the fetcher's thread: find staging memory, let the member read into it."""
        leave_bytes = self._node.staging.capacity_bytes // 2 if opened.far else 0
        slot = self._node.staging.take(request.size_bytes, deadline_s, leave_bytes)
        if slot is None:
            self._later(partial(self._fail_fetch, request.id, opened, "deadline", "no staging memory in time"))
            return
        offset, view = slot

        def loaded(error: PoolError | None) -> None:
            self._later(partial(self._finish_fetch, request, opened, offset, view, deadline_s, error))

        opened.load(view, deadline_s - time.monotonic(), loaded)

    def _fail_fetch(self, id: int, opened: OpenedBlock, reason: str, detail: str) -> None:
        opened.release()
        self._leave()
        self._reply(wire.Failed(id, reason, detail))

    def _finish_fetch(
        self,
        request: wire.Read,
        opened: OpenedBlock,
        offset: int,
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
            self._node.staging.give(offset, request.size_bytes)
            opened.release()
            self._leave()

    def _send_block(
        self, id: int, key: BlockKey, checksum: int, data: memoryview, deadline_s: float, ready_s: float
    ) -> None:
        if time.monotonic() > deadline_s:
            self._reply(wire.Failed(id, "deadline", "the node came to it too late"))
            return
        self._send(wire.frame(wire.Block(id, key, checksum), len(data)), data, ready_s)

    def _send(self, head: bytes, data: memoryview, ready_s: float) -> None:
        """Send at the node's pace what was ready at `ready_s`."""
        pacer = self._node.pacer
        with self._send_lock:
            if pacer is None:
                wire.send_all(self._sock, head, data)
                return
            for at in range(0, len(data), PIECE_BYTES):
                piece = data[at : at + PIECE_BYTES]
                self._sent_s = pacer.wait(len(piece), ready_s)
                wire.send_all(self._sock, b"" if at else head, piece)

    # --- writes ---

    def _write(self, request: wire.Write, payload_bytes: int) -> None:
        if payload_bytes != request.size_bytes or len(request.key) != KEY_BYTES or len(request.parent) != KEY_BYTES:
            raise wire.ProtocolError(f"write of {request.size_bytes} bytes with a payload of {payload_bytes}")
        deadline_s = time.monotonic() + request.timeout_s
        entered = self._enter()
        slot = self._node.staging.take(payload_bytes, deadline_s) if entered else None
        if slot is None:
            if entered:
                self._leave()
            self._drain(payload_bytes)
            limit = self._node.staging.capacity_bytes
            reason = "full" if payload_bytes > limit else "dropped"
            detail = f"no staging memory for {payload_bytes} bytes in time; the node has {limit}"
            self._reply(wire.Failed(request.id, reason, detail))
            return
        offset, view = slot
        try:
            wire.receive_exactly(self._sock, view[:payload_bytes])
        except BaseException:
            self._node.staging.give(offset, payload_bytes)
            raise
        if block_checksum(request.key, view[:payload_bytes]) != request.checksum:
            self._node.staging.give(offset, payload_bytes)
            self._leave()
            self._reply(wire.Failed(request.id, "checksum", f"block {request.key.hex()} was damaged on its way here"))
            return

        def stored(error: PoolError | None) -> None:
            self._node.staging.give(offset, payload_bytes)
            self._leave()
            reply = wire.Failed(request.id, error.reason, error.detail) if error else wire.Written(request.id)
            self._later(partial(self._reply, reply))

        remaining_s = deadline_s - time.monotonic()
        self._pool.write(request.block, view, remaining_s, stored)

    def _drain(self, size_bytes: int) -> None:
        scratch = memoryview(bytearray(min(size_bytes, _DRAIN_BYTES)))
        while size_bytes:
            part = scratch[: min(size_bytes, len(scratch))]
            wire.receive_exactly(self._sock, part)
            size_bytes -= len(part)

    # --- sending ---

    def _reply(self, message: wire.Reply) -> None:
        with self._send_lock:
            wire.send_all(self._sock, wire.frame(message))

    def _later(self, send: Callable[[], None]) -> None:
        self._out.put(send)

    def _send_later(self) -> None:
        """Every queued send runs, even when the connection is gone: it also gives slots and pins back."""
        ended = False
        while not ended or self._in_flight:
            send = self._out.get()
            if send is None:
                ended = True
                continue
            try:
                send()
            except OSError as error:
                log.debug("connection of %s ended: %s", self._peer, error)
                self.cut()
            except Exception:
                log.exception("connection of %s failed", self._peer)
                self.cut()

    def _enter(self) -> bool:
        with self._count_lock:
            self._in_flight += 1
            if self._in_flight <= IN_FLIGHT_MAX:
                return True
            self._in_flight -= 1
            return False

    def _leave(self) -> None:
        with self._count_lock:
            self._in_flight -= 1
