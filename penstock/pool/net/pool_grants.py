"""A pool node's side of one-sided writes: a client fills space that the node grants, and commits it with a message.

The blocks of a committed span are verified by their checksums before they are stored. The space is memory of this
module alone, from which they are copied: a client that writes at the wrong time can damage what others write at that
moment, but no block that is stored or lent. What it damages between the check and the copy is found as all damage is,
by the checksum, when the block is read. The space of a grant that ended without a word of its client is used again
after QUARANTINE_S, as a write that has begun goes on, or once the client's transfers have ended with its connection
(`core.pool.grants`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from penstock.core.layout import staging_bytes
from penstock.core.pool.grants import GrantTable
from penstock.io.memory import address_of
from penstock.pool.api import PoolError
from penstock.pool.local.extents import ExtentAllocator
from penstock.pool.losses import note_loss
from penstock.pool.net import wire
from penstock.pool.net.store_span import store_whole
from penstock.pool.node_backend import NodeBackend
from penstock.process.guarded_thread import GuardedWorker

CAPACITY_BYTES_MAX = 256 << 20
CLIENT_SHARE = 0.5  # of the space
GRANTS_MAX = 1024
QUARANTINE_S = 60.0
COMMITS_MAX = 256  # that wait to be verified
STORE_THREADS = 2

Locate = Callable[[int, int], tuple[int, int, int] | None]  # (address, bytes) -> (epoch, region, offset)


class Writer(Protocol):
    """A client's connection."""

    def answer(self, reply: wire.Reply) -> None:
        """Send this answer, from any thread; never waits."""


class PoolGrants:
    """The space for one-sided writes to a node. Any thread may call."""

    def __init__(self, memory: memoryview, locate: Locate, clock: Callable[[], float] = time.monotonic) -> None:
        """`memory` is registered; `locate` says where an address lies in the regions of the node."""
        self._memory, self._locate, self._clock = memory, locate, clock
        self._lock = threading.Lock()
        self._space = ExtentAllocator(0, len(memory))
        self.bytes_of_client_max = int(CLIENT_SHARE * len(memory))
        self._table = GrantTable(self.bytes_of_client_max, GRANTS_MAX, QUARANTINE_S)
        self._slots: dict[int, tuple[int, int]] = {}  # grant -> offset and length of its space
        self._worker = GuardedWorker("penstock-commits", COMMITS_MAX, threads=STORE_THREADS)
        self.written_bytes = 0

    def grant(self, client: Writer, request: wire.Grant) -> wire.Granted:
        """Space for a span; where none is free, the client writes in messages."""
        length, now_s = request.blocks * staging_bytes(request.size_bytes), self._clock()
        with self._lock:
            self._free(self._table.run_out(now_s))
            at = self._space.take(length) if self._table.may_grant(client, length) else None
            if at is None:
                return wire.Granted(request.id)
            number = self._table.grant(client, length, now_s + min(request.timeout_s, wire.LEASE_S_MAX))
            self._slots[number] = at, length
        found = self._locate(address_of(self._memory) + at, length)
        if found is None:
            self.returned(client, [number])
            return wire.Granted(request.id)
        epoch, region, offset = found
        return wire.Granted(request.id, epoch, number, region, offset)

    def commit(self, client: Writer, pool: NodeBackend, request: wire.Commit) -> None:
        """Verify what a client has written, and have `pool` store it; answered by `client.answer`."""
        now_s, span = self._clock(), request.span
        with self._lock:
            self._free(self._table.run_out(now_s))
            open_ = self._table.commit(client, request.lease, now_s)
            at, length = self._slots.get(request.lease, (0, 0))
        if not open_:
            client.answer(wire.Failed(request.id, "dropped", "the grant has ended"))
            return
        padded = staging_bytes(span.size_bytes)
        if span.blocks * padded > length:
            self._ended(request.lease)
            client.answer(wire.Failed(request.id, "layout", f"{span.blocks} blocks into a grant of {length} bytes"))
            return
        views = [self._memory[at + number * padded : at + (number + 1) * padded] for number in range(span.blocks)]
        store = partial(self._store, client, pool, request, views, now_s + request.timeout_s)
        if not self._worker.put(store, partial(self._failed, client, request)):
            self._ended(request.lease)
            client.answer(wire.Failed(request.id, "dropped", "too many commits wait in this node"))

    def _store(
        self,
        client: Writer,
        pool: NodeBackend,
        request: wire.Commit,
        views: Sequence[memoryview],
        deadline_s: float,
    ) -> None:
        span = request.span

        def stored(results: list[PoolError | None]) -> None:
            self._ended(request.lease)
            for error in results:
                if error is not None and error.reason == "checksum":
                    note_loss("write_checksum", "", "a one-sided write: %s", error)
            with self._lock:
                self.written_bytes += span.size_bytes * results.count(None)
            client.answer(wire.WrittenMany(request.id, *wire.states_of(results)))

        checksums = wire.unpack_checksums(span.checksums)
        store_whole(pool, span.new_blocks(), views, checksums, deadline_s - self._clock(), stored)

    def _failed(self, client: Writer, request: wire.Commit, error: Exception) -> None:
        self._ended(request.lease)
        client.answer(wire.Failed(request.id, "device", f"the node failed: {error!r}"))

    def _ended(self, number: int) -> None:
        """A grant that was committed has ended; later calls do nothing."""
        with self._lock:
            if number in self._slots:
                self._table.stored(number)
                self._free([number])

    def _free(self, numbers: Sequence[int]) -> None:
        """The lock is held."""
        for number in numbers:
            self._space.give(*self._slots.pop(number))

    def returned(self, client: object, numbers: Sequence[int]) -> None:
        """Nothing of the client is written to these grants any more."""
        with self._lock:
            self._free(self._table.give_back(client, numbers))

    def gone(self, client: object, writes_ended: bool = False) -> None:
        """A client's connection has ended. `writes_ended`: nothing that it writes arrives any more."""
        with self._lock:
            self._free(self._table.leave(client, self._clock(), writes_ended))

    @property
    def free_bytes(self) -> int:
        """Space that is free now."""
        with self._lock:
            self._free(self._table.run_out(self._clock()))
            return self._space.free_bytes

    def check_integrity(self) -> None:
        """Assert that every grant has space, and only grants do; for tests."""
        with self._lock:
            self._table.check_integrity()
            self._space.check_integrity()
            assert len(self._table) == len(self._slots)
            used = sum(length for _, length in self._slots.values())
            assert used + self._space.free_bytes == len(self._memory)

    def close(self, timeout_s: float) -> None:
        """Verify and store no more."""
        self._worker.close(timeout_s)
