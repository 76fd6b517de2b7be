"""One client connection to a pool node: requests out, replies straight into their buffers, and a clean end.

CLIENT-1  Statement: Only the reader writes into buffers and ends requests, so no byte is written after `end`. There is
          at most one: the receiver thread, on a control connection also a thread that waits for an answer (`Reader`);
          none while nothing is under way (`link_watch`).
CLIENT-2  Statement: `cut` shuts the socket down; the reader then stops, waits for a send in progress, and ends all
          open requests. Where there is none, a receiver thread is started for that.
CLIENT-3  Statement: A block, single or of a span, is accepted only with the requested id, key and size, and only if its
          checksum matches or the request's `check` passes. Any other reply is accepted only for a request that it
          answers (`wire.ANSWERS`).
Verification: tests/pool/net/test_fuzz_pool_client.py, tests/pool/net/test_link_threads.py.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import xxhash

from penstock.core.keys import BlockKey
from penstock.core.spans import parts
from penstock.pool.api import PoolError, ReadCheck
from penstock.pool.checksum import block_checksum, checksum_seed
from penstock.pool.net import lanes, wire
from penstock.pool.net.link_watch import LinkWatch
from penstock.pool.net.payload_receiver import PIECE_BYTES, PayloadReceiver
from penstock.pool.net.reply_reader import ReplyReader
from penstock.pool.net.secret import Secret, SecretRefused, prove_as_client
from penstock.pool.net.tls import PeerTls
from penstock.pool.net.tls_socket import Stream, TlsSocket, begin_tls
from penstock.process.guarded_thread import GuardedThread, GuardedWorker, count_failure

log = logging.getLogger(__name__)

SENDER_END_S = 3.0 * wire.STALL_S  # limit of the wait for a send in progress, which ends once the socket is shut
PARK_S = 0.5  # a connection without requests has its thread for so long
ASKED_PARK_S = 0.005  # so, where the last request was one whose sender waits: the next one needs no thread
SENDS_WAITING_MAX = 256  # the link has far fewer requests on one connection
ASKED = wire.Lookup | wire.Evict | wire.Stat  # requests whose senders wait for the answer
# Who reads: the receiver thread; nobody, and `link_watch` watches ("parked"); nobody until who asked waits for the
# answer ("asked"); a thread that waits for its answer ("caller").
Reader = Literal["thread", "parked", "asked", "caller"]


@dataclass(slots=True, eq=False)
class Pending:
    """A request that has not ended. `end(result, error)` is called once. `buffers` are filled by a read, or sent
    by a write: one for each block, of its size. `payload_bytes`: of request or reply. `late` is set when the
    connection is cut because this request missed its deadline."""

    message: wire.Request
    id: int
    deadline_s: float
    end: Callable[[Any, PoolError | None], None]
    buffers: Sequence[memoryview] = ()
    payload_bytes: int = 0
    connection: Connection | None = None
    ended: bool = False
    late: bool = False
    awaited: bool = False  # its sender waits, and does not read
    checks: Sequence[ReadCheck | None] = (None,)  # verify the blocks that are read; None: by the checksum
    part: Callable[[wire.LentMany], None] | None = None  # takes the answers before the last one

    def tell(self, result: Any, error: PoolError | None) -> None:
        """Call `end`; an exception in it is logged and affects no other request."""
        try:
            self.end(result, error)
        except Exception:
            count_failure("penstock-done-callback")
            log.exception("the callback of a request failed")


def _damaged(key: BlockKey) -> PoolError:
    return PoolError("checksum", f"block {key.hex()} does not match its checksum")


class Connection:
    """One connection. The constructor connects and greets; `start` starts the receiver. `node` is the peer's
    `Ready`."""

    def __init__(
        self,
        address: tuple[str, int],
        timeout_s: float,
        on_reply: Callable[[Connection], None],
        on_closed: Callable[[Connection, str], None],
        hello: wire.Hello,
        watch: LinkWatch,
        urgent: bool = False,
        secret: Secret | None = None,
        tls: PeerTls | None = None,
        on_hot: Callable[[Sequence[BlockKey]], None] = lambda _: None,
    ) -> None:
        """Raises OSError, wire.ProtocolError when the peer is no pool node of this version, and RuntimeError or
        MemoryError where the operating system starts no thread.

        `watch` watches the connection while nothing is under way on it: it has no thread then. `on_reply` is called
        after each request that ended, `on_closed` at the end of the connection, before its open requests end. `hello`
        opens the lane that it names; packets of an `urgent` lane go before bulk (`lanes`). With a `secret` both sides
        prove that they have it; with `tls` both show certificates, and all further bytes are encrypted. `on_hot` gets
        blocks that were read here and that the node's clients read often.
        """
        self.lane = hello.lane
        self.heard_s = self._sent_s = time.monotonic()  # time of the last bytes from the peer, and to it
        self._on_reply, self._on_closed, self._on_hot = on_reply, on_closed, on_hot
        self._secret, self._tls = secret, tls
        self._lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._pending: dict[int, Pending] = {}
        self.in_flight_bytes = 0
        self._cut_reason: str | None = None
        self.open = True  # requests can be sent: nothing has cut the connection
        self._watch = watch
        self._end_watched = False  # of a control connection: its end is watched, also while somebody reads
        self._reader: Reader = "thread"
        self._replies: ReplyReader | None = None  # of a control connection without TLS
        self._park_s = PARK_S
        self._receiver: GuardedThread | None = None
        self._sender: GuardedWorker | None = None  # while there are writes
        self._done = threading.Event()  # it has ended
        self._tcp = socket.create_connection(address, timeout=timeout_s)
        self._sock: Stream = self._tcp
        lanes.mark(self._sock, urgent)
        try:
            self.node = self._greet(hello, address[0], timeout_s)
        except BaseException:
            self._sock.close()
            raise
        if self.lane == "control" and self._sock is self._tcp:
            self._replies = ReplyReader(self._tcp)
        self._payload = PayloadReceiver(self._sock)

    def start(self) -> None:
        """Start the receiver thread. Raises RuntimeError or MemoryError where the operating system starts no thread;
        `abandon` must follow then."""
        self._receiver = GuardedThread(f"penstock-{self.lane}-receive", self._receive)
        self._receiver.start()

    @property
    def in_flight(self) -> int:
        """Requests that were sent and have not ended."""
        return len(self._pending)

    def add(self, pending: Pending) -> bool:
        """Register a request; False when the connection is ending. `send` or `queue` must follow."""
        with self._lock:
            if self._cut_reason is not None:
                return False
            self._pending[pending.id] = pending
            self.in_flight_bytes += pending.payload_bytes
            return True

    def ask(self, pending: Pending) -> bool:
        """As `add`, then `send`, of a request whose sender calls `answer`: who then reads, so that this costs no other
        thread."""
        with self._lock:
            if self._cut_reason is not None:
                return False
            self._pending[pending.id] = pending
            if self._reader == "parked" and self._replies is not None:
                self._reader = "asked"
        self._send(pending)
        return True

    def answer(self, pending: Pending, until_s: float) -> None:
        """Read replies on this thread, if nobody else does, until this request has ended, at most until `until_s`."""
        with self._lock:
            if self._reader != "asked" or self._replies is None:
                pending.awaited = True
                return
            self._reader = "caller"
        try:
            while pending.id in self._pending and (found := self._replies.next(until_s)) is not None:
                self._handle(*found)
            if not self._park() and self._needs_thread():
                self.start()
        except (OSError, wire.ProtocolError, RuntimeError, MemoryError) as error:
            self._finish(str(error))
        except Exception as error:  # noqa: BLE001 (the connection ends by it)
            self._finish(self._note_failed(error))
        except BaseException:  # of this thread, not of the connection: but nobody else would read
            self._finish("its reader was interrupted")
            raise

    def _needs_thread(self) -> bool:
        """Stop to read on the caller's thread; returns whether the receiver thread must go on: the senders of what is
        left do not read themselves."""
        with self._lock:
            left = self._pending.values()
            others = any(one.awaited or not isinstance(one.message, ASKED) for one in left)
            needed = others or not left or self._cut_reason is not None
            self._reader = "thread" if needed else "asked"
            return needed

    def woken(self) -> None:
        """As `link_watch.Parked`: start the receiver thread again, unless somebody reads. Where the operating system
        starts none, the connection ends."""
        self._end_watched = False  # whoever parks the connection has it watched again, and hears of an end at once
        try:
            self._resume()
        except (RuntimeError, MemoryError) as error:
            self._finish(f"no thread for its replies: {error}")

    def _resume(self) -> None:
        """Start the receiver thread, unless somebody reads. Raises as `start`."""
        with self._lock:
            before = self._reader
            if before in ("parked", "asked"):
                self._reader = "thread"
        if before == "parked" and self._replies is None:
            self._watch.unpark(self._tcp.fileno())
        if before in ("parked", "asked"):
            self.start()

    def _end_soon(self, reason: str) -> None:
        """End a connection that has no thread, on the watching one."""
        self.cut(reason)
        with self._lock:
            self._reader = "parked"
        self._watch.call_by(self._end_now, 0.0)

    def _end_now(self) -> None:
        self.woken()

    def _park(self) -> bool:
        """Have the connection watched, without a thread; False where something is under way. Raises OSError. Of a
        control connection only the end is watched: an answer that nobody waits for is read with the next one."""
        with self._lock:
            partial = self._replies is not None and self._replies.partial
            if self._pending or self._cut_reason is not None or partial:
                return False
            if self._replies is None:
                self._watch.park(self._tcp.fileno(), self)
            elif not self._end_watched:
                self._watch.watch_end(self._tcp.fileno(), self)
                self._end_watched = True
            self._reader = "parked"
            sender, self._sender = self._sender, None
        if sender is not None:
            sender.stop()
        return True

    def send(self, pending: Pending) -> None:
        """Send a request that was added; its answer needs a receiver thread. A failure ends the connection and thereby
        the request."""
        try:
            if self._reader in ("parked", "asked"):
                self._resume()
        except (RuntimeError, MemoryError) as error:
            self._end_soon(f"no thread for its replies: {error}")
            return
        self._send(pending)

    def _send(self, pending: Pending) -> None:
        writes = isinstance(pending.message, wire.Write | wire.WriteMany)
        payload = pending.buffers if writes else ()
        try:
            head = wire.frame(pending.message, pending.payload_bytes if writes else 0)
        except Exception as error:  # noqa: BLE001 (the message cannot be encoded: nothing of it was sent)
            if self._take(pending.id) is pending:
                pending.tell(None, PoolError("layout", f"the request cannot be sent: {error}"))
            return
        try:
            with self._send_lock:
                if self._cut_reason is None:
                    wire.send_all(self._sock, head, *payload)
                    self._sent_s = time.monotonic()
        except (OSError, TypeError, ValueError) as error:
            self.cut(str(error))

    def say_alive(self, quiet_s: float) -> None:
        """Send Alive, if nothing was sent for `quiet_s` seconds; never waits."""
        if time.monotonic() - self._sent_s < quiet_s:
            return
        if self._reader == "asked":  # who asked did not wait for the answer
            self.woken()
        if not self._send_lock.acquire(blocking=False):
            return
        try:
            if self._cut_reason is None and self._comes(select.POLLOUT, 0.0):
                wire.send_all(self._sock, wire.frame(wire.Alive()))
                self._sent_s = time.monotonic()
        except OSError as error:
            self.cut(str(error))
        finally:
            self._send_lock.release()

    def tell(self, message: wire.Corrupt | wire.Return | wire.ReturnMany) -> None:
        """Send a message that has no answer; the receiver thread notices a failure."""
        with self._send_lock, contextlib.suppress(OSError):
            wire.send_all(self._sock, wire.frame(message))

    def queue(self, pending: Pending) -> None:
        """Queue a request that was added for the sender thread (write lane only: a payload takes time to send)."""
        try:
            with self._lock:
                if self._sender is None:
                    self._sender = GuardedWorker(f"penstock-{self.lane}-send", SENDS_WAITING_MAX)
                sender = self._sender
        except (RuntimeError, MemoryError) as error:
            self.cut(f"no thread for its writes: {error}")
            return
        if not sender.put(partial(self.send, pending), self._sending_failed):
            self.cut(f"{SENDS_WAITING_MAX} requests wait to be sent, or the connection is ending")

    def _sending_failed(self, error: Exception) -> None:
        self.cut(f"sending failed: {error!r}")

    def cut(self, reason: str) -> None:
        """End the connection now; its open requests end from the receiver thread."""
        with self._lock:
            if self._cut_reason is None:
                self._cut_reason, self.open = reason, False
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if self._reader == "asked":  # who asked may wait no more
            self._watch.call_by(self._end_now, 0.0)

    def cut_late(self, pending: Pending) -> bool:
        """Cut the connection because this request missed its deadline; False when it has just ended."""
        with self._lock:
            if self._pending.get(pending.id) is not pending:
                return False
            pending.late = True
        self.cut("a deadline was missed")
        return True

    def forget(self, pending: Pending) -> bool:
        """Drop a control request whose caller has stopped waiting (it has no buffer); False when it has just ended."""
        with self._lock:
            forgotten = self._pending.pop(pending.id, None) is not None
        if self._reader == "asked":  # nobody waits for its late answer, or for the end of the connection
            self.woken()
        return forgotten

    def abandon(self) -> None:
        """End a connection that was not started."""
        self.cut("not wanted")
        self._sock.close()

    def join(self, timeout_s: float) -> None:
        """Wait at most `timeout_s` for the connection, which was started, to end."""
        if self._receiver is None or not self._receiver.is_current:
            self._done.wait(timeout_s)

    def _greet(self, hello: wire.Hello, host: str, timeout_s: float) -> wire.Ready:
        """Exchange versions and open the lane, within the connect timeout; afterwards the caller watches deadlines."""
        secret, tls, until_s = self._secret, self._tls, time.monotonic() + timeout_s
        first = bytearray(wire.GREETING.size)
        plain = secret is None and tls is None
        self._sock.sendall(wire.greeting(secret is not None, tls is not None) + (wire.frame(hello) if plain else b""))
        wire.receive_exactly(self._sock, memoryview(first), until_s=until_s)
        wire.check_greeting(first, secret is not None, tls is not None)
        if tls is not None:
            assert isinstance(self._sock, socket.socket)
            self._sock = begin_tls(self._sock, tls, "client", host, until_s)
        if secret is not None:
            try:
                prove_as_client(self._sock, secret, wire.SECRET_PURPOSE)
            except SecretRefused as error:
                raise wire.ProtocolError(str(error)) from None
        if not plain:
            self._sock.sendall(wire.frame(hello))
        header, _ = wire.FrameReader(self._sock).next(until_s=until_s)
        reply = wire.decode_reply(header)
        if isinstance(reply, wire.Failed):
            raise wire.ProtocolError(reply.detail)
        if not isinstance(reply, wire.Ready):
            raise wire.ProtocolError(f"the node answered the greeting with {type(reply).__name__}")
        self._sock.settimeout(None)
        wire.set_timeouts(self._sock)
        return reply

    def _comes(self, event: int, timeout_s: float) -> bool:
        """Wait for select.POLLIN or POLLOUT; whether it came, or the end of the connection."""
        waiting = select.poll()
        waiting.register(self._tcp, event)
        return bool(waiting.poll(1000 * timeout_s))

    def _idle(self) -> bool:
        """Wait for a reply, not for long where none is due; whether the connection is parked then."""
        if self._pending or (isinstance(self._sock, TlsSocket) and self._sock.buffered):
            return False
        if self._replies is not None and self._replies.partial:
            return False
        return not self._comes(select.POLLIN, self._park_s) and self._park()

    def _receive(self) -> None:
        reason, parked = "the connection failed", False
        try:
            frames = wire.FrameReader(self._sock) if self._replies is None else None
            while not (parked := self._idle()):
                found = frames.next() if frames is not None else self._next_reply()
                if found is not None:
                    self._handle(*found)
        except (OSError, wire.ProtocolError) as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001 (the connection ends by it)
            reason = self._note_failed(error)
        finally:
            if not parked:
                self._finish(reason)

    def _next_reply(self) -> tuple[bytes, int] | None:
        assert self._replies is not None
        return self._replies.next(time.monotonic() + wire.STALL_S)

    def _note_failed(self, error: Exception) -> str:
        """Count and log an unexpected failure to receive; returns why the connection ends."""
        count_failure(f"penstock-{self.lane}-receive")
        log.error("the receiver of a %s connection failed", self.lane, exc_info=error)
        return f"receiving failed: {error!r}"

    def _handle(self, header: bytes | memoryview, payload_bytes: int) -> None:
        """Receive the rest of a reply, and end its request. Raises OSError, ProtocolError."""
        self.heard_s = time.monotonic()
        reply = wire.decode_reply(header)
        if isinstance(reply, wire.Found) and not payload_bytes:
            self._receive_answer(reply)
            return
        moves = isinstance(reply, wire.Block | wire.Blocks | wire.Probed)
        if payload_bytes and (self._replies is not None or not moves):
            raise wire.ProtocolError("only Block, Blocks and Probed have a payload")
        if isinstance(reply, wire.Block):
            self._receive_block(reply, payload_bytes)
        elif isinstance(reply, wire.Blocks):
            self._receive_span(reply, payload_bytes)
        elif isinstance(reply, wire.Probed):
            self._receive_probe(reply, payload_bytes)
        elif isinstance(reply, wire.Failed):
            known = reply.reason if reply.reason in PoolError.REASONS else "network"
            self._end(self._take(reply.id), None, PoolError(known, reply.detail))
        elif not isinstance(reply, wire.Ready):
            self._receive_answer(reply)

    def _asked(self, id: int) -> Pending | None:
        return self._pending.get(id)

    def _receive_block(self, reply: wire.Block, payload_bytes: int) -> None:
        pending = self._asked(reply.id)
        message = pending.message if pending else None
        if pending is None or not isinstance(message, wire.Read):
            raise wire.ProtocolError("the node sent a block that was not requested")
        if reply.key != message.key or payload_bytes != message.size_bytes:
            raise wire.ProtocolError("the node sent another block than the requested one")
        check, buffer = pending.checks[0], pending.buffers[0]
        error = self._receive_verified(message.key, buffer, check, reply.checksum, reply.mac)
        self._payload.end()
        taken = self._take(reply.id)
        self._note_hot([message.key] if reply.hot else [])
        if error is not None:
            self.tell(wire.Corrupt(message.key, reply.checksum, reply.mac, error.reason == "mac"))
        self._end(taken, reply, error)

    def _receive_verified(
        self, key: BlockKey, buffer: memoryview, check: ReadCheck | None, checksum: int, mac: bytes
    ) -> PoolError | None:
        """Receive a block, and verify it piece by piece; returns what is wrong with it."""
        digest = xxhash.xxh3_64(seed=checksum_seed(key)) if check is None else None
        self._check_open()
        for piece in self._payload.pieces(buffer):
            self.heard_s = time.monotonic()
            if digest is not None:
                digest.update(piece)
            if self._cut_reason is not None:
                raise ConnectionError(self._cut_reason)
        if check is not None:  # a MAC is computed over the whole block
            return check(buffer, checksum, mac)
        return _damaged(key) if digest is not None and digest.intdigest() != checksum else None

    def _receive_span(self, reply: wire.Blocks, payload_bytes: int) -> None:
        """Receive and verify the blocks that are here; the request ends with one error or None for each block."""
        pending = self._asked(reply.id)
        message = pending.message if pending else None
        if pending is None or not isinstance(message, wire.ReadMany):
            raise wire.ProtocolError("the node sent blocks that were not requested")
        here = [at for at, state in enumerate(reply.states) if not state]
        if reply.keys != message.keys or payload_bytes != len(here) * message.size_bytes:
            raise wire.ProtocolError("the node sent other blocks than the requested ones")
        keys, checksums = wire.split_keys(reply.keys), wire.unpack_checksums(reply.checksums)
        macs = reply.macs or [b""] * len(keys)
        errors = wire.errors_of(reply.states, reply.detail)
        buffers, checks = pending.buffers, pending.checks
        together = PIECE_BYTES // message.size_bytes
        if together < 2:
            for at in here:
                errors[at] = self._receive_verified(keys[at], buffers[at], checks[at], checksums[at], macs[at])
        else:
            for some in parts(here, message.size_bytes, PIECE_BYTES):
                self._check_open()
                self._payload.fill([buffers[at] for at in some])
                self.heard_s = time.monotonic()
                for at in some:
                    if (check := checks[at]) is not None:
                        errors[at] = check(buffers[at], checksums[at], macs[at])
                    elif block_checksum(keys[at], buffers[at]) != checksums[at]:
                        errors[at] = _damaged(keys[at])
        self._payload.end()
        taken = self._take(reply.id)
        self._note_hot([keys[at] for at in reply.hot])
        for at in here:
            if (error := errors[at]) is not None:
                self.tell(wire.Corrupt(keys[at], checksums[at], macs[at], error.reason == "mac"))
        self._end(taken, errors, None)

    def _note_hot(self, keys: Sequence[BlockKey]) -> None:
        if keys:
            self._on_hot(keys)

    def _check_open(self) -> None:
        if self._cut_reason is not None:
            raise ConnectionError(self._cut_reason)

    def _receive_answer(self, reply: wire.Answer) -> None:
        """Handle a reply without payload. A reply of the wrong kind is refused: it would end a read whose buffer was
        never filled."""
        pending = self._asked(reply.id)
        if pending is not None and not isinstance(reply, wire.ANSWERS[type(pending.message)]):
            raise wire.ProtocolError(f"the node answered {type(pending.message).__name__} with {type(reply).__name__}")
        if isinstance(reply, wire.LentMany) and reply.more:
            if pending is not None and pending.part is not None:
                pending.part(reply)
            return
        self._end(self._take(reply.id), reply, None)

    def _receive_probe(self, reply: wire.Probed, payload_bytes: int) -> None:
        pending = self._asked(reply.id)
        message = pending.message if pending else None
        if pending is None or not isinstance(message, wire.Probe):
            raise wire.ProtocolError("the node sent a probe that was not requested")
        if payload_bytes != message.size_bytes:
            raise wire.ProtocolError("the node sent another probe than the requested one")
        self._payload.fill(pending.buffers)
        self._payload.end()
        self._end(self._take(reply.id), reply, None)

    def _take(self, id: int) -> Pending | None:
        with self._lock:
            pending = self._pending.pop(id, None)
            if pending is not None:
                self.in_flight_bytes -= pending.payload_bytes
        if pending is None and self.lane != "control":
            raise wire.ProtocolError("the node answered a request that nobody made")
        return pending

    def _end(self, pending: Pending | None, result: Any, error: PoolError | None) -> None:
        if pending is not None:
            self._park_s = ASKED_PARK_S if isinstance(pending.message, ASKED) else PARK_S
            pending.tell(result, error)
            self._on_reply(self)

    def _finish(self, reason: str) -> None:
        with self._lock:
            self._reader = "thread"
        self.cut(reason)
        reason = self._cut_reason or reason
        with self._lock:
            sender, self._sender = self._sender, None
        if sender is not None:
            sender.close(SENDER_END_S)
        with self._send_lock:
            self._watch.unpark(self._tcp.fileno())
            self._sock.close()
        try:
            self._on_closed(self, reason)
        except Exception:  # open requests must end all the same
            count_failure(f"penstock-{self.lane}-receive")
            log.exception("the callback at the end of a %s connection failed", self.lane)
        with self._lock:
            rest, self._pending = list(self._pending.values()), {}
            self.in_flight_bytes = 0
        for pending in rest:
            label = "deadline" if pending.late else "closed" if reason == "closed" else "network"
            pending.tell(None, PoolError(label, "no answer in time" if pending.late else reason))
        self._done.set()
