"""One client's connection at a node of the pool protocol: greeting, requests that need no staging memory, and sending.

The greeting needs no thread: `greet` is a generator that the node's accepting thread resumes when the socket is ready.
Afterwards a thread reads requests (and sends memory blocks directly from the member), as long as messages come
(`pool.net.idle`); another one sends the results of slower work, once there are any. Both are guarded: an exception ends
a request or the connection, is logged and counted, and the node goes on. Subclasses read and write blocks:
`pool.net.pool_connection` for a pool, `cluster.handoff.relay` for a relay.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from penstock.core.connection_limits import network_of
from penstock.core.keys import KEY_BYTES, BlockKey
from penstock.pacing import PIECE_BYTES
from penstock.pool.api import Located, PoolError
from penstock.pool.losses import note_loss
from penstock.pool.net import lanes, wire
from penstock.pool.net.idle import PARK_S
from penstock.pool.net.payload_receiver import PayloadLimits, PayloadReceiver
from penstock.pool.net.secret import NONCE_BYTES, PROOF_BYTES, Secret, SecretRefused
from penstock.pool.net.tls import TlsError
from penstock.pool.net.tls_socket import Stream, TlsSocket
from penstock.pool.node_backend import NodeBackend, StoredBlock
from penstock.process.guarded_thread import GuardedWorker
from penstock.process.rate_limited_log import kind_of
from penstock.units import format_address

if TYPE_CHECKING:
    from penstock.pool.net.node import PoolNode

log = logging.getLogger(__name__)

IN_FLIGHT_MAX = 128  # loads and writes of one connection that are not answered yet
SENDS_MAX = 4 * IN_FLIGHT_MAX
SENDER_END_S = 3.0 * wire.STALL_S  # limit of the wait for a send in progress, which ends once the socket is shut
PAYLOAD_S = 30.0  # least time for a payload, when its request's deadline is sooner or has passed
PAYLOAD_BYTES_PER_S_MIN = 256 << 10  # a client that sends or receives a payload more slowly is disconnected
PAYLOAD_GRACE_S = 10.0  # allowed on top of the time at that rate
KEYS_AT_ONCE = 1024  # keys answered from members of this process before other connections have their turn
PAUSE_S = 50e-6  # long enough that another thread gets the interpreter lock
_SEND_BYTES = 4 << 20
_DRAIN_BYTES = 64 << 10
_SINGLE_BLOCKS = "this node takes single blocks only"
_PROBE = bytes(wire.PROBE_BYTES_MAX)
_OF_BLOCKS = (  # requests that move bytes
    wire.Read, wire.Write, wire.ReadMany, wire.WriteMany, wire.Probe, wire.Lend, wire.Offer, wire.LendMany, wire.Grant,
    wire.Commit,
)  # fmt: skip
_REFUSED_BYTES_MAX = 64 << 10  # a larger payload costs more than its message, also when it is refused

_CONNECTION_S = 0.0005  # CPU time of a connection's threads, besides its messages

Steps = Generator[int, None, None]  # yields the event to wait for: selectors.EVENT_READ or EVENT_WRITE

Answer = TypeVar("Answer")
Moved = Callable[[int], None]


def not_counted(size_bytes: int) -> None:
    """Ignore progress: for payloads whose rate is not watched."""


def _take(sock: Stream, size: int) -> Generator[int, None, bytes]:
    """Receive `size` bytes from a socket that does not block. Raises OSError."""
    taken = bytearray()
    while len(taken) < size:
        try:
            part = sock.recv(size - len(taken))
        except BlockingIOError:
            yield selectors.EVENT_READ
            continue
        if not part:
            raise ConnectionError("the peer closed the connection")
        taken += part
    return bytes(taken)


def _give(sock: Stream, data: bytes) -> Steps:
    """Send over a socket that does not block. Raises OSError."""
    while data:
        try:
            data = data[sock.sendmsg([data]) :]
        except BlockingIOError:
            yield selectors.EVENT_WRITE


def _pieces(payload: Sequence[memoryview], piece_bytes: int) -> Iterator[list[memoryview]]:
    """The payload in pieces of at most `piece_bytes`, each of as few buffers as possible; one empty piece at least."""
    pieces: list[memoryview] = []
    room = piece_bytes
    for data in payload:
        at = 0
        while at < len(data):
            part = data[at : at + room]
            pieces.append(part)
            at += len(part)
            room -= len(part)
            if not room:
                yield pieces
                pieces, room = [], piece_bytes
    if pieces or not payload:
        yield pieces


def _limits(until_s: float) -> PayloadLimits:
    """Of a payload from a client."""
    return PayloadLimits(until_s, wire.MinimumRate(PAYLOAD_GRACE_S, PAYLOAD_BYTES_PER_S_MIN))


class ClientConnection:
    """One connection at the node: of an unknown peer until `greet` has ended."""

    def __init__(self, node: PoolNode, sock: socket.socket, peer: str) -> None:
        """`sock` does not block until `start`."""
        self._node = node
        self._pool: NodeBackend = node.pool
        self.sock = sock
        self._sock: Stream = sock
        self.peer = peer
        self.source = network_of(peer.rpartition(":")[0])
        self.greet_by_s = time.monotonic() + wire.GREET_S
        self._said_version = False
        self._ready: wire.Reply | None = None
        self._send_lock = threading.Lock()
        self._count_lock = threading.Lock()
        self._in_flight = 0
        self._sent_s = 0.0  # when the last paced block was sent
        self._refused = False  # the reading thread answered the last request with an error
        self._reader_id = 0
        self._ended = False  # nothing can be sent any more
        self._pause: threading.Event | None = None  # set at the end of the connection: ends every pause
        self._serving: tuple[wire.FrameReader, select.poll] | None = None  # made in `start`: there may be thousands
        self._payload: PayloadReceiver  # made in `start`
        self._done = threading.Event()  # the connection has ended, and its socket is closed
        self._sender: GuardedWorker | None = None  # while it has work
        self._sender_lock = threading.Lock()
        self._no_more = False  # no sender is started any more

    def greet(self) -> Steps:
        """Versions, TLS, secret, Hello. The answer to Hello is sent once the connection has its threads (`start`):
        until then it may still be refused. Raises ProtocolError, SecretRefused or OSError."""
        secret, tls, sock = self._node.secret, self._node.tls, self._sock
        first = yield from _take(sock, wire.GREETING.size)
        self._said_version = True
        yield from _give(sock, wire.greeting(secret is not None, tls is not None))
        wire.check_greeting(first, secret is not None, tls is not None)
        if tls is not None:
            secured = TlsSocket(self.sock, tls, "server", None)
            yield from secured.handshake()
            sock = self._sock = secured
        if secret is not None:
            yield from self._challenge(secret)
        head = yield from _take(sock, wire.HEAD_BYTES)
        header_bytes, payload_bytes = wire.frame_lengths(head)
        if header_bytes > wire.HELLO_BYTES_MAX:
            raise wire.ProtocolError(f"a first message of {header_bytes} bytes; {wire.HELLO_BYTES_MAX} are allowed")
        header = head[wire.PREFIX.size : wire.PREFIX.size + header_bytes]
        header += yield from _take(sock, header_bytes - len(header))
        request = wire.decode_request(memoryview(header))
        if not isinstance(request, wire.Hello):
            raise wire.ProtocolError(f"the first message is {type(request).__name__}, not Hello")
        if payload_bytes:
            raise wire.ProtocolError("only Write has a payload")
        reply, refusal = self._answer_hello(request)
        if refusal:
            yield from _give(sock, wire.frame(reply))
            raise wire.ProtocolError(refusal)
        self._ready = reply

    def say_refused(self, detail: str) -> None:
        """Send an unknown peer the reason why its connection ends. With a secret or TLS nothing is sent: the peer would
        read the message as a nonce, or as a TLS record."""
        if self._node.secret is None and self._node.tls is None:
            version = b"" if self._said_version else wire.greeting()
            with contextlib.suppress(OSError):
                self._sock.sendmsg([version + wire.frame(wire.Failed(0, "network", detail))])

    def _challenge(self, secret: Secret) -> Steps:
        nonce = os.urandom(NONCE_BYTES)
        yield from _give(self._sock, nonce)
        answer = yield from _take(self._sock, NONCE_BYTES + PROOF_BYTES)
        yield from _give(self._sock, secret.check(wire.SECRET_PURPOSE, nonce, answer))

    def start(self) -> None:
        """Serve the client that has greeted. Raises RuntimeError or MemoryError where the operating system starts no
        thread, OSError where the connection has ended; `abandon` must follow then."""
        self._sock.setblocking(True)
        wire.set_timeouts(self._sock)
        self._pause = threading.Event()
        readable = select.poll()
        readable.register(self.sock, select.POLLIN)
        self._serving = wire.FrameReader(self._sock), readable
        self._payload = PayloadReceiver(self._sock)
        self._node.idle.begin(self)

    def serve(self, expired: bool) -> None:
        """As `pool.net.idle.Idle`."""
        self._node.spare_threads.run(f"penstock-node-{self.peer}", partial(self._serve, expired))

    def fileno(self) -> int:
        """The socket's file; -1 once it is closed."""
        return self.sock.fileno()

    def abandon(self) -> None:
        """End a connection that has no thread."""
        if self._sender is not None:
            self._sender.stop()
        self.cut()
        self._sock.close()
        self._done.set()

    def cut(self) -> None:
        """End the connection; its threads notice."""
        self._ended = True
        if self._pause is not None:
            self._pause.set()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def join(self, timeout_s: float) -> None:
        """Wait at most `timeout_s` for the connection to end."""
        if self._serving is not None:
            self._done.wait(timeout_s)

    def _serve(self, expired: bool) -> None:
        """Answer requests until none comes for a while: then the connection is parked, without a thread."""
        parked = False
        try:
            if expired:
                raise TimeoutError(f"the peer sent no message for {wire.IDLE_S:g} s")
            self._reader_id = threading.get_ident()
            if self._ready is not None:
                ready, self._ready = self._ready, None
                self._reply(ready)
                self._wait(self._node.pause_of(self.source))
            self._serve_requests()
            self._rest()
            parked = True
        except (wire.ProtocolError, OSError) as error:
            self.say_ended(error)
        finally:
            if parked:
                self._node.idle.park(self)
            else:
                self.end()

    def _rest(self) -> None:
        """End the sender's thread if it has no work; the next piece of work starts another one."""
        with self._sender_lock:
            if self._sender is not None and not self._sender.waiting:
                self._sender.stop()
                self._sender = None

    def end(self) -> None:
        """End the connection, whose thread the caller is, and free everything of it."""
        self.cut()
        with self._sender_lock:
            sender, self._no_more = self._sender, True
        if sender is not None:
            sender.stop()  # work that ends from now on frees its memory on its own thread
        self._leave()
        if sender is not None:
            sender.join(SENDER_END_S)
        self._node.idle.ended(self, self.fileno())
        self._sock.close()
        self._node.left(self)
        self._done.set()

    def say_ended(self, error: wire.ProtocolError | SecretRefused | OSError) -> None:
        """Log why the connection ends."""
        if isinstance(error, wire.ProtocolError | SecretRefused | TlsError):
            self._node.rare.warning(kind_of(error), "connection of %s closed: %s", self.peer, error)
        elif isinstance(error, TimeoutError):
            self._node.rare.warning(kind_of(error), "connection of %s ended: %s", self.peer, error)
        else:
            log.debug("connection of %s ended: %s", self.peer, error)

    def _leave(self) -> None:
        """The connection has ended: drop everything of it that waits."""

    def _serve_requests(self) -> None:
        """Answer requests until none has come for PARK_S."""
        assert self._serving is not None
        frames, readable = self._serving
        counted_s = time.thread_time()
        try:
            while self._comes(readable):
                asked_s = time.monotonic()
                header, payload_bytes = frames.next(wire.IDLE_S)
                now_s = time.monotonic()
                request = wire.decode_request(header)
                if payload_bytes and not isinstance(request, wire.Write | wire.WriteMany):
                    raise wire.ProtocolError("only Write has a payload")
                # A request that was received already became ready while the link was busy with the previous one.
                ready_s = min(now_s, self._sent_s) if now_s - asked_s < 0.0001 else now_s
                self._refused = False
                self._answer(request, payload_bytes, ready_s)
                now_cpu_s = time.thread_time()
                used_s, counted_s = now_cpu_s - counted_s, now_cpu_s
                refused = self._refused and payload_bytes <= _REFUSED_BYTES_MAX
                if refused or not isinstance(request, _OF_BLOCKS):
                    self._wait(self._node.pause_after(self.source, used_s))
        except (wire.ProtocolError, OSError):  # work for a message that failed counts too
            self._node.pause_after(self.source, time.thread_time() - counted_s + _CONNECTION_S)
            raise

    def _comes(self, readable: select.poll) -> bool:
        """Wait up to PARK_S for a message; whether there is one. Raises OSError."""
        return self._buffered() or bool(readable.poll(1000 * PARK_S))

    def _buffered(self) -> bool:
        """Whether received bytes wait in this process."""
        return isinstance(self._sock, TlsSocket) and self._sock.buffered

    def _wait(self, pause_s: float) -> None:
        if pause_s and self._pause is not None:
            self._pause.wait(pause_s)

    def _answer(self, request: wire.Request, payload_bytes: int, ready_s: float) -> None:
        match request:
            case wire.Lookup(id) | wire.Evict(id) | wire.Stat(id):
                reply: wire.Reply
                try:
                    reply = self._control(request)
                except PoolError as error:
                    reply = wire.Failed(id, error.reason, error.detail)
                self._reply(reply)
            case wire.Read() | wire.ReadMany() | wire.Write() | wire.WriteMany() | wire.Probe():
                self._move(request, payload_bytes, ready_s)
            case wire.Corrupt(key, checksum, mac, refused):
                self._pool.suspect(key, checksum, mac, refused)
            case wire.Alive() | wire.ReturnMany():
                pass  # any message shows that the client is there; nothing was lent here
            case wire.Hello():
                reply, refusal = self._answer_hello(request)
                self._reply(reply)
                if refusal:
                    raise wire.ProtocolError(refusal)
            case (
                wire.Open() | wire.HandedOver() | wire.Attach() | wire.Lend() | wire.Offer() | wire.LendMany()
                | wire.Grant() | wire.Commit()
            ):  # fmt: skip
                detail = "this is a pool node, not the relay of a decode engine"
                self._reply(wire.Failed(request.id, "layout", detail))

    def _move(
        self,
        request: wire.Read | wire.ReadMany | wire.Write | wire.WriteMany | wire.Probe,
        payload_bytes: int,
        ready_s: float,
    ) -> None:
        match request:
            case wire.Read():
                self._read(request, ready_s)
            case wire.ReadMany():
                self._read_many(request, ready_s)
            case wire.Write():
                self._write(request, payload_bytes)
            case wire.WriteMany():
                self._write_many(request, payload_bytes)
            case wire.Probe():
                self._probe(request, ready_s)

    def _answer_hello(self, hello: wire.Hello) -> tuple[wire.Reply, str | None]:
        """The answer, and why this node does not serve the client, if so."""
        if hello.origin or hello.own_only:
            own = self._node.pool.own
            if own is None:
                refusal = "it asked for this node's own members, and this node has none"
                detail = "the node has no members of its own, which the client asked for"
                return wire.Failed(0, "network", detail), refusal
            self._pool = own
        refused = self._node.greeted(self)
        if refused is not None:
            here = format_address(*self._sock.getsockname()[:2])
            refusal = f"node {here} {refused}"
            return wire.Failed(0, "network", refusal), refusal
        lanes.mark(self._sock, self._is_urgent(hello.lane))
        rate, block_bytes_max = self._pool.read_bytes_per_s, self._node.block_bytes_max(self._pool)
        span_bytes_max, kind = self._node.span_bytes_max(self._pool), self._node.one_sided
        named, siblings = (self._node.name, self._node.node_id), list(self._node.siblings)
        figures = rate, block_bytes_max, wire.IDLE_S, span_bytes_max
        return wire.Ready(*named, *figures, kind, siblings, self._pool.takes_copies), None

    def _is_urgent(self, lane: str) -> bool:
        return lane == "control"

    def _control(self, request: wire.Lookup | wire.Evict | wire.Stat) -> wire.Reply:
        """Answer a control request. Raises PoolError when the pool does not answer."""
        if isinstance(request, wire.Stat):
            with self._turn():
                stat = self._pool.stat(request.timeout_s)
            return wire.Stats(request.id, self._node.with_ways(stat).bounded())
        if isinstance(request, wire.Lookup):
            return self._look_up(request)
        keys = wire.split_keys(request.keys)
        return wire.Evicted(request.id, sum(self._in_pieces(keys, lambda some: [self._pool.evict(some)])))

    def _look_up(self, request: wire.Lookup) -> wire.Found:
        """Answer a lookup; one of few keys, as most are, without an object for each. Raises as `_control`."""
        keys, timeout_s = request.keys, request.timeout_s
        if self._answers_alone and not request.origins and 0 < len(keys) <= KEYS_AT_ONCE * KEY_BYTES:
            wire.check_keys(keys)
            with self._turn():
                places = self._pool.locate(keys, timeout_s)
            if isinstance(places, Located):
                return wire.found_alike(request.id, places, len(keys) // KEY_BYTES, request.brief)
            return wire.found(request.id, places)
        each = wire.split_keys(keys)
        hits = self._in_pieces(each, lambda some: self._pool.lookup(some, timeout_s))
        return wire.found(request.id, hits, self._pool.origins(each) if request.origins else ())

    @property
    def _answers_alone(self) -> bool:
        """Whether this process answers control requests alone, without waiting for other nodes."""
        return self._pool.own is self._pool

    def _turn(self) -> contextlib.AbstractContextManager[None]:
        return self._node.turns.turn(self.source) if self._answers_alone else contextlib.nullcontext()

    def _in_pieces(self, keys: list[BlockKey], ask: Callable[[list[BlockKey]], Sequence[Answer]]) -> list[Answer]:
        """Answer from members of this process in pieces, with pauses in which other connections are served; from
        members on other nodes in one piece, as those nodes pause themselves."""
        if not self._answers_alone:
            return list(ask(keys))
        answers: list[Answer] = []
        for at in range(0, len(keys), KEYS_AT_ONCE):
            if at:
                time.sleep(PAUSE_S)
            with self._turn():
                answers += ask(keys[at : at + KEYS_AT_ONCE])
        return answers

    def _probe(self, request: wire.Probe, ready_s: float) -> None:
        if not 0 < request.size_bytes <= wire.PROBE_BYTES_MAX:
            detail = f"a probe of {request.size_bytes} bytes; 1 to {wire.PROBE_BYTES_MAX} are allowed"
            self._reply(wire.Failed(request.id, "layout", detail))
            return
        # Not from staging memory, which holds tenants' blocks.
        data = memoryview(_PROBE)[: request.size_bytes]
        self._send(wire.frame(wire.Probed(request.id), len(data)), [data], ready_s, ready_s)

    def _read(self, request: wire.Read, ready_s: float) -> None:
        """Answer with the block or with Failed, now or later (`_later`); `ready_s`: when the client began to wait."""
        raise NotImplementedError

    def _write(self, request: wire.Write, payload_bytes: int) -> None:
        """Receive the payload, and answer with Written or Failed, now or later. Raises ProtocolError."""
        raise NotImplementedError

    def _read_many(self, request: wire.ReadMany, ready_s: float) -> None:
        """As `_read`, with Blocks."""
        self._reply(wire.Failed(request.id, "layout", _SINGLE_BLOCKS))

    def _write_many(self, request: wire.WriteMany, payload_bytes: int) -> None:
        """As `_write`, with WrittenMany."""
        self._drain(payload_bytes)
        self._reply(wire.Failed(request.id, "layout", _SINGLE_BLOCKS))

    def _lost(self, kind: str, detail: str) -> None:
        """Count and log that a request of this client failed for a reason on the node's side."""
        note_loss(kind, self._node.place, "node %s: a request of %s ended: %s", self._node.place, self.peer, detail)

    # --- blocks ---

    def _send_block(
        self,
        id: int,
        block: StoredBlock,
        data: memoryview,
        deadline_s: float,
        ready_s: float,
        moved: Moved = not_counted,
        hot: bool = False,
    ) -> None:
        if time.monotonic() > deadline_s:
            self._reply_late(id)
            return
        head = wire.frame(wire.Block(id, block.key, block.checksum, block.mac, hot), len(data))
        self._send(head, [data], ready_s, deadline_s, moved)
        self._node.note_sent(len(data))

    def _reply_late(self, id: int) -> None:
        self._lost("read_deadline", "the node processed it after its deadline")
        self._reply(wire.Failed(id, "deadline", "the node processed it after its deadline"))

    def _send(
        self,
        head: bytes,
        payload: Sequence[memoryview],
        ready_s: float,
        deadline_s: float,
        moved: Moved = not_counted,
    ) -> None:
        """Send a payload that was ready at `ready_s`, at the node's pace; the client stops waiting soon after
        `deadline_s`. `moved(bytes)` is called for each part."""
        pacer, until_s = self._node.pacer, max(deadline_s, time.monotonic()) + PAYLOAD_S
        rate = wire.MinimumRate(PAYLOAD_GRACE_S, PAYLOAD_BYTES_PER_S_MIN)
        piece_bytes = _SEND_BYTES if pacer is None else PIECE_BYTES
        self._check_open()
        with self._send_lock:
            for pieces in _pieces(payload, piece_bytes):
                self._check_open()
                size_bytes = sum(map(len, pieces))
                if pacer is not None:
                    self._sent_s = pacer.wait(size_bytes, ready_s)
                wire.send_all(self._sock, head, *pieces, until_s=until_s, rate=rate)
                head = b""
                moved(size_bytes)

    def _send_answers(self, parts: Sequence[memoryview], answers: int, deadline_s: float) -> None:
        """Send whole messages together, as fast as the peer takes them; clients stop waiting soon after `deadline_s`.
        Raises OSError."""
        until_s = max(deadline_s, time.monotonic()) + answers * PAYLOAD_S
        rate = wire.MinimumRate(PAYLOAD_GRACE_S, PAYLOAD_BYTES_PER_S_MIN)
        self._check_open()
        with self._send_lock:
            self._check_open()
            wire.send_all(self._sock, *parts, until_s=until_s, rate=rate)

    def _receive(self, into: memoryview, deadline_s: float = 0.0, moved: Moved = not_counted) -> None:
        """Receive the payload of a write; it gets at least PAYLOAD_S. `moved(bytes)` is called for each part. Raises
        OSError."""
        self._receive_all([into], deadline_s, moved)

    def _receive_all(self, intos: Sequence[memoryview], deadline_s: float = 0.0, moved: Moved = not_counted) -> None:
        """As `_receive`, into several buffers in order."""
        self._payload.fill_within(intos, _limits(max(deadline_s, time.monotonic() + PAYLOAD_S)), moved)
        self._payload.end()

    def _drain(self, size_bytes: int) -> None:
        scratch = memoryview(bytearray(min(size_bytes, _DRAIN_BYTES)))
        limits = _limits(time.monotonic() + 2 * PAYLOAD_S)
        while size_bytes:
            part = scratch[: min(size_bytes, len(scratch))]
            self._payload.fill_within([part], limits, not_counted)
            size_bytes -= len(part)
        self._payload.end()

    # --- sending ---

    def _check_open(self) -> None:
        """Raise ConnectionError once the connection is ending: a sender must then not wait for other sends."""
        if self._ended:
            raise ConnectionError("the connection is ended")

    def _reply(self, message: wire.Reply) -> None:
        self._check_open()
        if isinstance(message, wire.Failed):
            self._refuse_next()
        with self._send_lock:
            wire.send_all(self._sock, wire.frame(message), until_s=time.monotonic() + PAYLOAD_S)

    def _refuse_next(self) -> None:
        """The request is answered with an error: where its reading thread does that, its time counts."""
        if threading.get_ident() == self._reader_id:
            self._refused = True

    def _later(self, send: Callable[[], None]) -> None:
        """Call `send` on the sender's thread. `send` also frees slots and pins, so it is always called: on this thread
        and without sending, when the connection has ended or its queue is full."""
        if not self._put(partial(self._try, send)):
            self.cut()
            try:
                self._try(send)
            except Exception as error:  # noqa: BLE001 (any failure to send ends this connection)
                self._failed(error)

    def _put(self, work: Callable[[], None]) -> bool:
        """Queue work for the sender's thread, which is started if there is none; False where that cannot be."""
        with self._sender_lock:
            if self._sender is None and not self._no_more:
                try:
                    name = f"penstock-send-{self.peer}"
                    self._sender = GuardedWorker(name, SENDS_MAX, kind="penstock-node-send")
                except (RuntimeError, MemoryError) as error:
                    self._node.rare.warning("send", "no thread to answer %s: %s", self.peer, error)
            return self._sender is not None and self._sender.put(work, self._failed)

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
        """End a request that `_enter` admitted."""
        with self._count_lock:
            self._in_flight -= 1
