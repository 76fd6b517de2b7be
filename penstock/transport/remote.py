"""The pool of another machine, behind the interface of `pool.api`.

Reads go over data connections, writes over one of their own (in the background, never in the way of a load), lookups
and the rest over a control connection. Every request has a deadline; a read or write that is on the wire and misses it
costs its connection, so that late bytes never land in a reused buffer. Connections come back with growing pauses;
while the node is down, calls fail at once.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeVar

from penstock.core.keys import BlockKey
from penstock.core.new_block import NewBlock
from penstock.pool.api import Done, Located, PoolError, PoolStat, check_write
from penstock.pool.callbacks import Callbacks, call_done
from penstock.pool.checksum import block_checksum
from penstock.transport import wire
from penstock.transport.connection import Connection, Pending

log = logging.getLogger(__name__)

IN_FLIGHT_MAX = 32  # requests on the wire of one connection
IN_FLIGHT_BYTES = 16 << 20  # of blocks on the wire of one connection, beyond the first two
READS_WAITING_MAX = 8192
WRITES_WAITING_MAX = 64
BACKOFF_S = (0.05, 2.0)
NODE_MARGIN = 0.1  # the node is told to give up this share of the time earlier, so that its answer still arrives
EVICT_TIMEOUT_S = 2.0

Answer = TypeVar("Answer", wire.Found, wire.Evicted, wire.Stats)


@dataclass(slots=True)
class _Lane:
    """Connections of one kind and the requests that wait for room on them."""

    kind: str
    waiting_max: int
    connections: list[Connection | None]
    waiting: deque[Pending] = field(default_factory=deque)

    def open(self) -> list[Connection]:
        return [connection for connection in self.connections if connection is not None and connection.open]

    def free(self) -> Connection | None:
        """The open connection with the least on it, if it may take one more."""
        best = min(self.open(), key=lambda c: (c.in_flight_bytes, c.in_flight), default=None)
        if best is None or best.in_flight >= IN_FLIGHT_MAX:
            return None
        return best if best.in_flight < 2 or best.in_flight_bytes < IN_FLIGHT_BYTES else None


class RemotePool:
    """A pool node at `host`:`port`. Contract: `pool.api.Pool`."""

    def __init__(self, host: str, port: int, connections: int = 1, connect_timeout_s: float = 5.0) -> None:
        """Connects at once. Raises PoolError("network") when nobody answers or the versions differ."""
        if not 1 <= connections <= 64:
            raise ValueError(f"connections is {connections}; it must be from 1 to 64")
        self.address = (host, port)
        self._place = f"{host}:{port}"
        self._connect_timeout_s = connect_timeout_s
        self._control = _Lane("control", 0, [None])
        self._writes = _Lane("write", WRITES_WAITING_MAX, [None])
        self._reads = _Lane("read", READS_WAITING_MAX, [None] * connections)
        self._lanes = {lane.kind: lane for lane in (self._control, self._writes, self._reads)}
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._deadlines: list[tuple[float, int, Pending]] = []
        self._live = 0  # reads and writes that have not ended
        self._deadline_sooner = threading.Condition(self._lock)
        self._connection_lost = threading.Condition(self._lock)
        self._closed = False
        self._down_reason = "not connected"
        self._callbacks = Callbacks()
        self._threads = [
            threading.Thread(target=self._watch_deadlines, name="penstock-deadlines", daemon=True),
            threading.Thread(target=self._reconnect, name="penstock-reconnect", daemon=True),
        ]
        try:
            for lane in self._lanes.values():
                for slot in range(len(lane.connections)):
                    self._connect(lane, slot, connect_timeout_s)
        except (OSError, wire.ProtocolError) as error:
            self.close(1.0)
            raise PoolError("network", f"pool node {self._place}: {error}") from None
        for thread in self._threads:
            thread.start()

    # --- the interface ---

    def register(self, buffer: memoryview) -> None:
        """Nothing: sockets need no registration."""

    def lookup(self, keys: Sequence[BlockKey], timeout_s: float) -> list[Located | None]:
        deadline_s = time.monotonic() + timeout_s
        located: list[Located | None] = []
        for at in range(0, len(keys), wire.KEYS_PER_MESSAGE):
            joined = b"".join(keys[at : at + wire.KEYS_PER_MESSAGE])
            found = self._call(wire.Found, partial(wire.Lookup, keys=joined), deadline_s)
            routes = [(f"{name}@{self._place}", f"net@{self._place}") for name in found.names]
            for size, member in zip(found.sizes, found.members, strict=True):
                located.append(Located(size, routes[member]) if size else None)
        return located

    def read(self, key: BlockKey, size_bytes: int, into: memoryview, timeout_s: float, done: Done) -> None:
        if not 0 < size_bytes <= min(len(into), wire.PAYLOAD_BYTES_MAX):
            detail = f"a block of {size_bytes} bytes into a buffer of {len(into)}"
            self._callbacks.call(done, PoolError("layout", detail))
            return
        message = wire.Read(next(self._ids), key, size_bytes, 0.0)
        self._submit(self._reads, Pending(message, message.id, time.monotonic() + timeout_s, _no_end, into), done)

    def lease(self, key: BlockKey) -> None:
        """Nothing of a remote pool can be read in place."""
        return None

    def host_buffers(self) -> list[memoryview]:
        return []

    def write(self, block: NewBlock, data: memoryview, timeout_s: float, done: Done) -> None:
        error = check_write(block, data)
        if error is None and block.size_bytes > wire.PAYLOAD_BYTES_MAX:
            error = PoolError("layout", f"a block of {block.size_bytes} bytes; {wire.PAYLOAD_BYTES_MAX} are allowed")
        if error is not None:
            self._callbacks.call(done, error)
            return
        checksum = block_checksum(block.key, data[: block.size_bytes])
        message = wire.Write(next(self._ids), **asdict(block), checksum=checksum, timeout_s=0.0)
        self._submit(self._writes, Pending(message, message.id, time.monotonic() + timeout_s, _no_end, data), done)

    def evict(self, keys: Sequence[BlockKey]) -> int:
        deadline_s = time.monotonic() + EVICT_TIMEOUT_S
        gone = 0
        with contextlib.suppress(PoolError):
            for at in range(0, len(keys), wire.KEYS_PER_MESSAGE):
                joined = b"".join(keys[at : at + wire.KEYS_PER_MESSAGE])
                gone += self._call(wire.Evicted, partial(wire.Evict, keys=joined), deadline_s).blocks
        return gone

    def stat(self, timeout_s: float) -> PoolStat:
        return self._call(wire.Stats, wire.Stat, time.monotonic() + timeout_s).stat

    def close(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            self._closed = True
            self._down_reason = "closed"
            self._deadline_sooner.notify_all()
            self._connection_lost.notify_all()
            connections = [c for lane in self._lanes.values() for c in lane.connections if c is not None]
        for connection in connections:
            connection.cut("closed")
        for connection in connections:
            connection.join(max(0.0, deadline_s - time.monotonic()))
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(max(0.0, deadline_s - time.monotonic()))
        for lane in self._lanes.values():
            self._fail_waiting(lane, "closed", "the pool is closed")
        self._callbacks.close(max(0.0, deadline_s - time.monotonic()))

    # --- reads and writes ---

    def _submit(self, lane: _Lane, pending: Pending, done: Done) -> None:
        def end(_: Any, error: PoolError | None) -> None:
            with self._lock:
                pending.ended = True
                self._live -= 1
            call_done(done, error)

        pending.end = end
        with self._lock:
            refusal = self._refusal(lane)
            if refusal is None:
                self._live += 1
                lane.waiting.append(pending)
                self._push_deadline(pending)
        if refusal is not None:
            self._callbacks.call(done, refusal)
            return
        self._dispatch(lane)

    def _refusal(self, lane: _Lane) -> PoolError | None:
        if self._closed:
            return PoolError("closed", "the pool is closed")
        if not lane.open():
            return PoolError("network", f"pool node {self._place} is down: {self._down_reason}")
        if len(lane.waiting) >= lane.waiting_max:
            return PoolError("dropped", f"{len(lane.waiting)} {lane.kind}s wait for {self._place}; that is the limit")
        return None

    def _dispatch(self, lane: _Lane) -> None:
        """Send waiting requests as far as the connections have room."""
        while True:
            with self._lock:
                while lane.waiting and lane.waiting[0].ended:
                    lane.waiting.popleft()
                connection = lane.free() if lane.waiting else None
                if connection is None:
                    return
                pending = lane.waiting[0]
                remaining_s = pending.deadline_s - time.monotonic()
                if isinstance(pending.message, wire.Read | wire.Write):
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
            pending.end(None, PoolError(label, detail))

    # --- lookups and the rest ---

    def _call(self, kind: type[Answer], message: Callable[[int], wire.Request], deadline_s: float) -> Answer:
        """One request over the control connection, waited for. Raises PoolError."""
        answered = threading.Event()
        answers: list[tuple[Any, PoolError | None]] = []

        def end(result: Any, error: PoolError | None) -> None:
            answers.append((result, error))
            answered.set()

        id = next(self._ids)
        pending = Pending(message(id), id, deadline_s, end)
        with self._lock:
            if self._closed:
                raise PoolError("closed", "the pool is closed")
            connection = self._control.connections[0]
        if connection is None or not connection.add(pending):
            raise PoolError("network", f"pool node {self._place} is down: {self._down_reason}")
        connection.send(pending)
        if not answered.wait(max(0.0, deadline_s - time.monotonic())):
            connection.forget(pending)
            raise PoolError("deadline", f"pool node {self._place} did not answer in time")
        result, error = answers[0]
        if error is not None:
            raise error
        if not isinstance(result, kind):
            raise PoolError("network", f"pool node {self._place} answered with {type(result).__name__}")
        return result

    # --- connections ---

    def _connect(self, lane: _Lane, slot: int, timeout_s: float) -> None:
        def replied(_: Connection) -> None:
            if lane.waiting:
                self._dispatch(lane)

        def closed(connection: Connection, reason: str) -> None:
            self._lost(lane, slot, connection, reason)

        connection = Connection(self.address, lane.kind, timeout_s, replied, closed)
        with self._lock:
            lane.connections[slot] = connection
        connection.start()
        if self._closed:
            connection.cut("closed")

    def _lost(self, lane: _Lane, slot: int, connection: Connection, reason: str) -> None:
        with self._lock:
            if lane.connections[slot] is connection:
                lane.connections[slot] = None
            if not self._closed:
                self._down_reason = reason
                log.warning("a %s connection to pool node %s ended: %s", lane.kind, self._place, reason)
            down = not lane.open()
            self._connection_lost.notify_all()
        if down:
            label = "closed" if self._closed else "network"
            self._fail_waiting(lane, label, f"pool node {self._place} is down: {reason}")

    def _reconnect(self) -> None:
        pause_s = BACKOFF_S[0]
        while True:
            with self._lock:
                missing = self._missing()
                if not missing and not self._closed:
                    pause_s = BACKOFF_S[0]
                    self._connection_lost.wait()
                if self._closed:
                    return
                missing = self._missing()
            failed = False
            for lane, slot in missing:
                try:
                    self._connect(lane, slot, min(self._connect_timeout_s, BACKOFF_S[1]))
                except (OSError, wire.ProtocolError) as error:
                    failed = True
                    with self._lock:
                        self._down_reason = str(error)
                    break
                self._dispatch(lane)
            with self._lock:
                if failed and not self._closed:
                    self._connection_lost.wait(pause_s)
                    pause_s = min(2 * pause_s, BACKOFF_S[1])

    def _missing(self) -> list[tuple[_Lane, int]]:
        lanes = self._lanes.values()
        return [(lane, slot) for lane in lanes for slot, c in enumerate(lane.connections) if c is None]

    # --- deadlines ---

    def _push_deadline(self, pending: Pending) -> None:
        """With the lock held. Ended requests leave the heap when their time comes, or when they are half of it."""
        if not self._deadlines or pending.deadline_s < self._deadlines[0][0]:
            self._deadline_sooner.notify()
        heapq.heappush(self._deadlines, (pending.deadline_s, pending.id, pending))
        if len(self._deadlines) > 2 * self._live + 64:
            self._deadlines = [item for item in self._deadlines if not item[2].ended]
            heapq.heapify(self._deadlines)

    def _watch_deadlines(self) -> None:
        while True:
            unsent: list[Pending] = []
            sent: list[Pending] = []
            with self._lock:
                if self._closed:
                    return
                now_s = time.monotonic()
                while self._deadlines and (self._deadlines[0][2].ended or self._deadlines[0][0] <= now_s):
                    pending = heapq.heappop(self._deadlines)[2]
                    if pending.ended:
                        continue
                    if pending.connection is None:
                        pending.ended = True
                        unsent.append(pending)
                    else:
                        sent.append(pending)
                if not unsent and not sent:
                    self._deadline_sooner.wait(self._deadlines[0][0] - now_s if self._deadlines else None)
                    continue
            for pending in unsent:
                pending.end(None, PoolError("deadline", f"waited too long for a connection to {self._place}"))
            for pending in sent:
                if pending.connection is not None:
                    pending.connection.cut_late(pending)


def _no_end(_: Any, error: PoolError | None) -> None:
    raise AssertionError("replaced before the request is queued")
