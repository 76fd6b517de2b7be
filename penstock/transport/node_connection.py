"""One client's connection at a node of the pool protocol: greeting, requests that need no staging memory, and sending.

Threads: one reads requests (and sends memory blocks straight from the member), another one sends what slower work has
finished. Both are guarded: an exception costs a request or the connection, is logged and counted, and the node goes on.
How blocks are read and written is the subclass's: `transport.pool_connection` for a pool, `cluster.relay` for a relay.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from penstock.guarded_thread import GuardedThread, GuardedWorker
from penstock.pool.api import PoolError
from penstock.pool.losses import note_loss
from penstock.pool.served import ServedPool, StoredBlock
from penstock.transport import lanes, wire
from penstock.transport.pacer import PIECE_BYTES
from penstock.transport.secret import SecretRefused, prove_as_server
from penstock.units import format_address

if TYPE_CHECKING:
    from penstock.transport.node import PoolNode

log = logging.getLogger(__name__)

IN_FLIGHT_MAX = 128  # loads and writes of one connection that are not answered yet
SENDS_MAX = 4 * IN_FLIGHT_MAX
SENDER_END_S = 3.0 * wire.STALL_S  # what is being sent ends with the socket
PAYLOAD_S = 30.0  # for a payload whose request has less time than this, and for what a client takes after its deadline
_DRAIN_BYTES = 1 << 20
_PROBE = bytes(wire.PROBE_BYTES_MAX)


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
            self._node.rare.warning(str(error), "connection of %s closed: %s", self.peer, error)
        except TimeoutError as error:
            self._node.rare.warning(str(error), "connection of %s ended: %s", self.peer, error)
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
            case wire.Corrupt(key, checksum, mac, refused):
                self._pool.suspect(key, checksum, mac, refused)
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
            refusal = f"node {here} has {self._node.connections_max} connections, the limit"
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

    def _read(self, request: wire.Read, ready_s: float) -> None:
        """Answer with the block, or with Failed, now or later (`_later`); `ready_s`: since when the client waits."""
        raise NotImplementedError

    def _write(self, request: wire.Write, payload_bytes: int) -> None:
        """Receive the payload, and answer with Written or Failed, now or later. Raises ProtocolError."""
        raise NotImplementedError

    def _lost(self, kind: str, detail: str) -> None:
        """A request of this client comes to nothing, for a reason of the node's own."""
        note_loss(kind, self._node.place, "node %s: a request of %s ended: %s", self._node.place, self.peer, detail)

    # --- blocks ---

    def _send_block(self, id: int, block: StoredBlock, data: memoryview, deadline_s: float, ready_s: float) -> None:
        if time.monotonic() > deadline_s:
            self._lost("read_deadline", "the node came to it too late")
            self._reply(wire.Failed(id, "deadline", "the node came to it too late"))
            return
        self._send(
            wire.frame(wire.Block(id, block.key, block.checksum, block.mac), len(data)), data, ready_s, deadline_s
        )

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

    def _receive(self, into: memoryview, deadline_s: float = 0.0) -> None:
        """The payload of a write; at least PAYLOAD_S are left for it. Raises OSError."""
        wire.receive_exactly(self._sock, into, until_s=max(deadline_s, time.monotonic() + PAYLOAD_S))

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
