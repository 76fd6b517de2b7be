"""The connections to one pool node: lanes, deadlines, reconnecting.

Reads use data connections; writes use one of their own, so that they never delay a load; lookups and all other requests
use a control connection. Every request has a deadline. When a read or write that is on the wire misses it, the
connection is cut, so that no late byte is written into a reused buffer. A node that does not answer a question, and
sends nothing else for SILENT_S, is down: its connections are cut. Connections are made again, with growing pauses;
while the node is down, requests fail at once.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

from penstock.core.keys import BlockKey
from penstock.pool.api import PoolError, ReadCheck
from penstock.pool.callbacks import call_soon, callback_worker
from penstock.pool.losses import note_error
from penstock.pool.net import wire
from penstock.pool.net.connection import Connection, Pending
from penstock.pool.net.link_watch import link_watch
from penstock.pool.net.secret import Secret
from penstock.pool.net.tls import PeerTls
from penstock.process.guarded_thread import GuardedThread, count_failure
from penstock.units import format_address, format_bytes

log = logging.getLogger(__name__)

IN_FLIGHT_MAX = 32  # requests on the wire of one connection
IN_FLIGHT_BYTES = 16 << 20  # of blocks on the wire of one connection; two blocks are always allowed
READS_WAITING_MAX = 8192
WRITES_WAITING_MAX = 64
BACKOFF_S = (0.05, 2.0)
SILENT_S = 2.0
ALIVE_S_MIN = 0.1  # lower bound of the interval, whatever a node asks for
ALIVE_PER_IDLE = 3  # messages on an idle connection within the time after which the node would end it
NODE_MARGIN = 0.1  # the node gets a timeout shorter by this share, so that its answer arrives in time

Answer = TypeVar("Answer", wire.Found, wire.Evicted, wire.Stats)
Ended = Callable[[Any, PoolError | None], None]
Transfer = wire.Read | wire.Write | wire.ReadMany | wire.WriteMany
_TRANSFERS = (wire.Read, wire.Write, wire.ReadMany, wire.WriteMany)  # a tuple is tested faster than a union
Asked = wire.Open | wire.HandedOver | wire.Attach | wire.Lend | wire.Offer | wire.LendMany | wire.Grant | wire.Commit


@dataclass(slots=True)
class _Lane:
    """Connections of one kind, and the requests that wait for room on them."""

    kind: str
    waiting_max: int
    connections: list[Connection | None]
    waiting: deque[Pending] = field(default_factory=deque)

    def open(self) -> list[Connection]:
        return [connection for connection in self.connections if connection is not None and connection.open]

    @property
    def up(self) -> bool:
        """Whether any connection is open."""
        return any(connection is not None and connection.open for connection in self.connections)

    def free(self) -> Connection | None:
        """The open connection with the fewest bytes in flight, if it may get one more request."""
        best, least = None, (0, 0)
        for connection in self.connections:
            if connection is None or not connection.open:
                continue
            load = connection.in_flight_bytes, connection.in_flight
            if best is None or load < least:
                best, least = connection, load
        in_flight_bytes, in_flight = least
        if in_flight >= IN_FLIGHT_MAX or (in_flight >= 2 and in_flight_bytes >= IN_FLIGHT_BYTES):
            return None
        return best


def _bounded(timeout_s: float) -> float:
    """Clip a timeout to the bounds of a message; 0 for a negative one and for NaN."""
    return min(timeout_s, wire.TIMEOUT_S_MAX) if timeout_s > 0 else 0.0


def _ended_before(result: Any, error: PoolError | None) -> None:
    raise AssertionError("a request ended twice")


class NodeLink:
    """All connections to the pool node at `host`:`port`. `place` is its address as text, `node` its latest `Ready`
    (with an empty id until it was reached)."""

    def __init__(
        self,
        host: str,
        port: int,
        connections: int,
        connect_timeout_s: float,
        must_connect: bool = True,
        origin: bytes = b"",
        own_only: bool = False,
        urgent: frozenset[str] = frozenset({"control"}),
        secret: Secret | None = None,
        what: str = "pool node",
        tls: PeerTls | None = None,
    ) -> None:
        """Connects at once. Raises PoolError("network") when nobody answers, the versions differ, or the peer is
        `origin`, the node that this link belongs to; without `must_connect` it tries again instead. `urgent`: lanes
        whose packets go before bulk. `secret`: both ends prove that they have it. `tls`: both ends show certificates.
        `what`: name of the peer's kind in errors and logs."""
        if not 1 <= connections <= 64:
            raise ValueError(f"connections is {connections}; it must be from 1 to 64")
        self.address = (host, port)
        self.place = format_address(host, port)
        self.what = what
        self.node = wire.Ready("")
        self.on_hot: Callable[[Sequence[BlockKey]], None] = lambda keys: None  # must not block
        self._origin, self._own_only = origin, own_only
        self._urgent, self._secret, self._tls = urgent, secret, tls
        self._connect_timeout_s = connect_timeout_s
        self._control = _Lane("control", 1, [None])
        self._writes = _Lane("write", WRITES_WAITING_MAX, [None])
        self._reads = _Lane("read", READS_WAITING_MAX, [None] * connections)
        self._each_lane = self._control, self._writes, self._reads
        self._lanes = {lane.kind: lane for lane in self._each_lane}
        self._lock = threading.Lock()
        self._watch = link_watch.acquire()
        self._ids = itertools.count(1)
        self._deadlines: list[tuple[float, int, Pending]] = []
        self._live = 0  # reads, writes and probes that have not ended
        self._connection_lost = threading.Condition(self._lock)
        self._closed = False
        self._down_reason = "not connected"
        self._losing = False  # a lost connection was logged, and not all are connected again
        self._logged_failure = ""  # the failure to connect that was logged last
        self._block_bytes = 0  # size of this side's blocks; 0 until it is known
        self._logged_too_large = False
        self._reconnecting: GuardedThread | None = None  # while a connection is missing
        self._alive_s = 0.0  # when Alive is due
        self._began = False  # all connections were tried once
        try:
            self._callbacks = callback_worker()
        except BaseException:
            link_watch.release(self._watch)
            raise
        try:
            for lane, slot in self._missing():
                self._connect(lane, slot, connect_timeout_s)
        except (OSError, wire.ProtocolError) as error:
            self._logged_failure = self._down_reason = str(error)
            if must_connect:
                self.close(1.0)
                raise PoolError("network", f"{self.what} {self.place}: {error}") from None
            log.warning("%s %s is down: %s; it is tried again", self.what, self.place, error)
        except BaseException:
            self.close(1.0)
            raise
        self._began = True
        self._watch.call_by(self._due, 0.0)

    @property
    def control(self) -> object | None:
        """The control connection, if there is one; another object each time that it was connected again."""
        return self._control.connections[0]

    @property
    def up(self) -> bool:
        """Whether every lane has an open connection. Asked for each run of a lookup, so it is to be quick."""
        for lane in self._each_lane:
            for connection in lane.connections:
                if connection is not None and connection.open:
                    break
            else:
                return False
        return True

    @property
    def idle(self) -> bool:
        """Whether no request is open."""
        return not self._live

    @property
    def down_reason(self) -> str:
        """Why a connection ended last."""
        return self._down_reason

    def submit(
        self,
        lane: Literal["read", "write"],
        message: Transfer | wire.Probe,
        buffers: Sequence[memoryview],
        timeout_s: float,
        ended: Ended,
        checks: Sequence[ReadCheck | None] = (None,),
    ) -> None:
        """Send a request whose payload fills `buffers` or comes from them: one for each block, as long as the message's
        `size_bytes`. `ended(reply, error)` is called once; a ReadMany has an error or None for each block as its reply.
        `checks` verify the blocks that are read (None: by the checksum)."""
        until_s = time.monotonic() + _bounded(timeout_s)
        payload_bytes = len(buffers) * message.size_bytes
        pending = Pending(message, message.id, until_s, ended, buffers, payload_bytes, checks=checks)
        self._counted(pending, lane)
        with self._lock:
            refusal = self._refusal(self._lanes[lane])
            if refusal is None:
                self._live += 1
                self._lanes[lane].waiting.append(pending)
                self._push_deadline(pending)
        if refusal is not None:
            self.refuse(ended, refusal, lane)
            return
        self._dispatch(self._lanes[lane])

    def _counted(self, pending: Pending, what: str) -> None:
        """Wrap `ended`, so that the request no longer counts as live when it is called."""
        ended = pending.end

        def end(result: Any, error: PoolError | None) -> None:
            with self._lock:
                pending.ended = True
                self._live -= 1
            pending.buffers = pending.checks = ()  # it stays among the deadlines for a while
            pending.end = _ended_before  # else it holds itself: only the garbage collector would free it
            if error is not None and (what != "write" or error.reason != "dropped"):  # the node logs those
                note_error(what, f"{self.what} {self.place}", error)
            ended(result, error)

        pending.end = end

    def refuse(self, ended: Ended, error: PoolError, what: str = "request") -> None:
        """Call `ended(None, error)` soon, on another thread."""
        note_error(what, f"{self.what} {self.place}", error)
        call_soon(self._callbacks, partial(ended, None), error)

    def expect_blocks(self, block_bytes: int) -> str | None:
        """Compare the size of this side's blocks with what the node can hold, now and whenever it is reached. Returns
        the line that was logged now, or None."""
        self._block_bytes = block_bytes
        return self._check_block_bytes(self.node)

    def _check_block_bytes(self, node: wire.Ready) -> str | None:
        """Return why the node cannot hold this side's blocks, or None; logged once until the node can hold them."""
        if not 0 < node.block_bytes_max < self._block_bytes:
            self._logged_too_large = False
            return None
        text = (
            f"{self.what} {self.place} takes blocks of at most {format_bytes(node.block_bytes_max)}, "
            f"this engine's have {format_bytes(self._block_bytes)}: none is stored there or loaded from it; "
            "allowed: fewer tokens per block, or more --staging and larger members at that node"
        )
        if not self._logged_too_large:
            self._logged_too_large = True
            log.warning("%s", text)
        return text

    def note_hot(self, keys: Sequence[BlockKey]) -> None:
        """The node says that its clients read these blocks often."""
        try:
            self.on_hot(keys)
        except Exception:  # blocks that were read are whole all the same
            count_failure("penstock-hot-callback")
            log.exception("the callback for blocks that are read often failed")

    def next_id(self) -> int:
        """An id for a message, unique on this link."""
        return next(self._ids)

    def ask(
        self, kind: type[Answer], message: Callable[[int, float], wire.Request], deadline_s: float
    ) -> Callable[[], Answer]:
        """Send a request over the control connection: `message(id, timeout of the node)`. Call the result to wait for
        the answer. Both raise PoolError."""
        answered = threading.Lock()  # free once it is answered
        answered.acquire()
        answers: list[tuple[Any, PoolError | None]] = []

        def end(result: Any, error: PoolError | None) -> None:
            answers.append((result, error))
            answered.release()

        id, sent_s = next(self._ids), time.monotonic()
        deadline_s = sent_s + _bounded(deadline_s - sent_s)
        pending = Pending(message(id, (deadline_s - sent_s) * (1 - NODE_MARGIN)), id, deadline_s, end)
        with self._lock:
            if self._closed:
                raise PoolError("closed", "the pool is closed")
            connection = self._control.connections[0]
        if connection is None or not connection.ask(pending):
            raise PoolError("network", f"{self.what} {self.place} is down: {self._down_reason}")

        def wait() -> Answer:
            connection.answer(pending, deadline_s)
            if not answers and not answered.acquire(timeout=max(0.0, deadline_s - time.monotonic())):
                connection.forget(pending)
                self._cut_silent(sent_s)
                raise PoolError("deadline", f"{self.what} {self.place} did not answer in time")
            result, error = answers[0]
            if error is not None:
                raise error
            if not isinstance(result, kind):
                raise PoolError("network", f"{self.what} {self.place} answered with {type(result).__name__}")
            return result

        return wait

    def begin(
        self, message: Asked, timeout_s: float, ended: Ended, part: Callable[[wire.LentMany], None] | None = None
    ) -> None:
        """Send a request over the control connection; `ended(reply, error)` is called once, by its deadline. `part`
        gets the answers before the last one, where there are several; it must not raise."""
        timeout_s = _bounded(timeout_s)
        pending = Pending(message, message.id, time.monotonic() + timeout_s, ended, part=part)
        message.timeout_s = timeout_s * (1 - NODE_MARGIN)

        self._counted(pending, "request")
        with self._lock:
            refusal = self._refusal(self._control)
            connection = self._control.connections[0]
            if refusal is None and connection is not None and connection.add(pending):
                pending.connection = connection
                self._live += 1
                self._push_deadline(pending)
            else:
                connection = None
        if connection is None:
            error = refusal or PoolError("network", f"{self.what} {self.place} is down: {self._down_reason}")
            self.refuse(ended, error)
        else:
            connection.send(pending)

    def tell(self, message: wire.Corrupt | wire.Return | wire.ReturnMany) -> None:
        """Send a message that has no answer, if the node is up."""
        connection = self._control.connections[0]
        if connection is not None:
            connection.tell(message)

    def close(self, timeout_s: float) -> None:
        """Cut every connection; open requests end with "closed"."""
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            again, self._closed = self._closed, True
            self._down_reason = "closed"
            self._connection_lost.notify_all()
            reconnecting = self._reconnecting
            connections = [c for lane in self._lanes.values() for c in lane.connections if c is not None]
        for connection in connections:
            connection.cut("closed")
        for connection in connections:
            connection.join(max(0.0, deadline_s - time.monotonic()))
        if reconnecting is not None:
            reconnecting.join(max(0.0, deadline_s - time.monotonic()))
        self._watch.forget(self._due)
        for lane in self._lanes.values():
            self._fail_waiting(lane, "closed", "the pool is closed")
        self._callbacks.close(max(0.0, deadline_s - time.monotonic()))
        if not again:
            link_watch.release(self._watch)

    # --- reads and writes ---

    def _refusal(self, lane: _Lane) -> PoolError | None:
        if self._closed:
            return PoolError("closed", "the pool is closed")
        if not lane.up:
            return PoolError("network", f"{self.what} {self.place} is down: {self._down_reason}")
        if len(lane.waiting) >= lane.waiting_max:
            return PoolError("dropped", f"{len(lane.waiting)} {lane.kind}s wait for {self.place}; that is the limit")
        return None

    def _dispatch(self, lane: _Lane) -> None:
        """Send waiting requests while the connections have room."""
        while lane.waiting:
            with self._lock:
                while lane.waiting and lane.waiting[0].ended:
                    lane.waiting.popleft()
                connection = lane.free() if lane.waiting else None
                if connection is None:
                    return
                pending = lane.waiting[0]
                remaining_s = pending.deadline_s - time.monotonic()
                if isinstance(pending.message, _TRANSFERS):
                    pending.message.timeout_s = max(0.0, remaining_s * (1 - NODE_MARGIN))
                if not connection.add(pending):
                    continue
                lane.waiting.popleft()
                pending.connection = connection
            if lane is self._writes:
                connection.queue(pending)
            else:
                connection.send(pending)

    def _fail_waiting(self, lane: _Lane, label: str, detail: str) -> None:
        with self._lock:
            rest, lane.waiting = list(lane.waiting), deque()
            rest = [pending for pending in rest if not pending.ended]
            for pending in rest:
                pending.ended = True
        for pending in rest:
            pending.tell(None, PoolError(label, detail))

    # --- connections ---

    def _cut_silent(self, asked_s: float) -> None:
        """Cut the connections of a node that was asked at `asked_s` and has not sent a byte for SILENT_S."""
        with self._lock:
            connections = [connection for lane in self._lanes.values() for connection in lane.open()]
        heard_s = max((connection.heard_s for connection in connections), default=asked_s)
        if time.monotonic() - max(asked_s, heard_s) >= SILENT_S:
            for connection in connections:
                connection.cut("the node is silent")

    def _connect(self, lane: _Lane, slot: int, timeout_s: float) -> None:
        def replied(_: Connection) -> None:
            if lane.waiting:
                self._dispatch(lane)

        def closed(connection: Connection, reason: str) -> None:
            self._lost(lane, slot, connection, reason)

        hello = wire.Hello(lane.kind, self._origin, self._own_only)
        urgent = lane.kind in self._urgent
        connection = Connection(
            self.address, timeout_s, replied, closed, hello, self._watch, urgent, self._secret, self._tls, self.note_hot
        )
        if self._origin and connection.node.node_id == self._origin:
            connection.abandon()
            raise wire.ProtocolError("that is this node itself; it must not be a member of its own pool")
        self._check_one_node(connection)
        self.node = connection.node
        self._check_block_bytes(connection.node)
        with self._lock:
            lane.connections[slot] = connection
        try:
            connection.start()
        except BaseException:
            with self._lock:
                lane.connections[slot] = None
            connection.abandon()
            raise
        if self._closed:
            connection.cut("closed")

    def _check_one_node(self, connection: Connection) -> None:
        """Raise ProtocolError when a connection reaches another node than the earlier ones, because several nodes share
        one address or the address moved. All connections are then made again; otherwise blocks would be looked up at
        one node and read from another."""
        with self._lock:
            others = [one for lane in self._lanes.values() for one in lane.open()]
        known, found = self.node.node_id, connection.node.node_id
        if others and known and found and known != found:
            connection.abandon()
            for other in others:
                other.cut("another node answers at its address")
            raise wire.ProtocolError("its address leads to more than one node; allowed: an address for each node")

    def _lost(self, lane: _Lane, slot: int, connection: Connection, reason: str) -> None:
        with self._lock:
            if lane.connections[slot] is connection:
                lane.connections[slot] = None
            if not self._closed:
                self._down_reason = reason
                level = logging.WARNING if not self._losing else logging.INFO  # one line for all connections
                log.log(level, "a %s connection to %s %s ended: %s", lane.kind, self.what, self.place, reason)
                self._losing = True
            down = not lane.open()
            self._connection_lost.notify_all()
        self._watch.call_by(self._due, 0.0)
        if down:
            label = "closed" if self._closed else "network"
            self._fail_waiting(lane, label, f"{self.what} {self.place} is down: {reason}")

    def _begin_reconnecting(self) -> bool:
        """Start the thread that connects again, where a connection is missing; False when that cannot be started."""
        with self._lock:
            if self._closed or self._reconnecting is not None or not self._missing():
                return True
            thread = self._reconnecting = GuardedThread("penstock-reconnect", self._reconnect, restarts=True)
        try:
            thread.start()
        except (RuntimeError, MemoryError):
            with self._lock:
                self._reconnecting = None
            return False
        return True

    def _reconnect(self) -> None:
        pause_s = BACKOFF_S[0]
        while True:
            with self._lock:
                missing = self._missing()
                if not missing:
                    self._losing, self._logged_failure = False, ""
                if self._closed or not missing:
                    self._reconnecting = None
                    return
            failed = False
            for lane, slot in missing:
                try:
                    self._connect(lane, slot, min(self._connect_timeout_s, BACKOFF_S[1]))
                except (OSError, wire.ProtocolError, RuntimeError, MemoryError) as error:
                    failed = True
                    with self._lock:
                        if not self._closed:
                            if str(error) != self._logged_failure:
                                log.warning("%s %s is down: %s", self.what, self.place, error)
                            self._logged_failure = self._down_reason = str(error)
                    break
                self._alive_s = 0.0  # as this node asks for
                self._watch.call_by(self._due, 0.0)
                self._dispatch(lane)
            with self._lock:
                if failed and not self._closed:
                    self._connection_lost.wait(pause_s)
                    pause_s = min(2 * pause_s, BACKOFF_S[1])

    def _alive_every_s(self) -> float | None:
        """Interval of Alive messages on an idle connection; None: none are needed."""
        return max(self.node.idle_s / ALIVE_PER_IDLE, ALIVE_S_MIN) if self.node.idle_s > 0 else None

    def _say_alive(self, now_s: float) -> None:
        every_s = self._alive_every_s()
        if every_s is None:
            self._alive_s = now_s + wire.IDLE_S
            return
        self._alive_s = now_s + every_s
        with self._lock:
            connections = [connection for lane in self._lanes.values() for connection in lane.open()]
        for connection in connections:
            connection.say_alive(every_s / 2)

    def _missing(self) -> list[tuple[_Lane, int]]:
        lanes = self._lanes.values()
        return [(lane, slot) for lane in lanes for slot, c in enumerate(lane.connections) if c is None]

    # --- deadlines, on the thread of `link_watch` ---

    def _due(self) -> float | None:
        """End what is overdue; returns when to call again."""
        if self._closed or not self._began:
            return None
        now_s = time.monotonic()
        begun = self._begin_reconnecting()
        if now_s >= self._alive_s:
            self._say_alive(now_s)
        self._end_overdue(now_s)
        with self._lock:
            first_s = self._deadlines[0][0] if self._deadlines else self._alive_s
        return min(first_s, self._alive_s, self._alive_s if begun else now_s + BACKOFF_S[1])

    def _push_deadline(self, pending: Pending) -> None:
        """Add to the heap; the lock is held. Ended requests are removed at their deadline, or when they are half of the
        heap."""
        if not self._deadlines or pending.deadline_s < self._deadlines[0][0]:
            self._watch.call_by(self._due, pending.deadline_s)
        heapq.heappush(self._deadlines, (pending.deadline_s, pending.id, pending))
        if len(self._deadlines) > 2 * self._live + 64:
            self._deadlines = [item for item in self._deadlines if not item[2].ended]
            heapq.heapify(self._deadlines)

    def _end_overdue(self, now_s: float) -> None:
        unsent: list[Pending] = []
        sent: list[Pending] = []
        with self._lock:
            for pending in self._overdue(now_s):
                if pending.connection is None:
                    pending.ended = True
                    unsent.append(pending)
                else:
                    sent.append(pending)
        for pending in unsent:
            pending.tell(None, PoolError("deadline", f"waited too long for a connection to {self.place}"))
        for pending in sent:
            if pending.connection is None:
                continue
            if pending.buffers:
                pending.connection.cut_late(pending)
            elif pending.connection.forget(pending):
                pending.tell(None, PoolError("deadline", f"{self.place} did not answer in time"))

    def _overdue(self, now_s: float) -> Iterator[Pending]:
        """Remove from the heap, and yield, the open requests whose deadline has passed. The lock is held."""
        while self._deadlines and (self._deadlines[0][2].ended or self._deadlines[0][0] <= now_s):
            pending = heapq.heappop(self._deadlines)[2]
            if not pending.ended:
                yield pending
