"""The relay's side of one-sided reads: it lends its blocks to prefill engines, and reads blocks that they offer.

A lent block stays in the buffer, so lending is bounded: LEND_S_MAX in time, half of the buffer for one connection,
three quarters for all connections of one address.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from penstock.cluster.handoff.buffer import DecodeBuffer, HeldBlock
from penstock.cluster.handoff.deadlines import Deadline, Deadlines
from penstock.cluster.handoff.one_sided_links import read_one_sided
from penstock.pool.api import PoolError
from penstock.pool.losses import count_loss
from penstock.pool.net import wire
from penstock.pool.net.one_sided import Mover, RemoteMemory
from penstock.process.guarded_thread import GuardedWorker
from penstock.process.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

CLIENTS_MAX = 256
LENT_MAX = 4096
LENT_FEW = 16  # always allowed, also with a small buffer
LEND_S_MAX = 60.0
MOVES_WAITING_MAX = 4096


@dataclass(slots=True, eq=False)
class _Lent:
    """A block lent to the connection `lender`, of the address `source`."""

    held: HeldBlock
    lender: int
    source: str
    deadline: Deadline | None = None

    def end(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
        self.held.release()


class Lending:
    """Lent blocks, and clients whose memory is attached. Any thread may call."""

    def __init__(self, mover: Mover, buffer: DecodeBuffer) -> None:
        self._mover = mover
        self._buffer = buffer
        self._lock = threading.Lock()
        self._clients: OrderedDict[bytes, tuple[RemoteMemory, str]] = OrderedDict()  # client -> memory, source address
        self._lent: dict[tuple[int, int], _Lent] = {}  # (lender, id) -> block
        self._lent_of: Counter[int | str] = Counter()  # lender or source -> number of blocks
        self._deadlines = Deadlines("penstock-relay-lends")
        self._moves = GuardedWorker("penstock-relay-one-sided", waiting_max=MOVES_WAITING_MAX)

    def attach(self, client: bytes, kind: str, memory: bytes, source: str = "") -> bytes:
        """Attach a client's memory; returns the description of the buffer's memory. When there are too many clients,
        the oldest one of the address with the most is detached. Raises PoolError."""
        if kind != self._mover.kind:
            raise PoolError("layout", f"this relay offers {self._mover.kind}, not {kind}")
        remote = self._mover.attach(memory)
        old: list[RemoteMemory] = []
        with self._lock:
            if client in self._clients:
                old.append(self._clients.pop(client)[0])
            self._clients[client] = remote, source
            while len(self._clients) > CLIENTS_MAX:
                most, _ = Counter(place for _, place in self._clients.values()).most_common(1)[0]
                oldest = next(name for name, (_, place) in self._clients.items() if place == most)
                old.append(self._clients.pop(oldest)[0])
        for gone in old:
            self._close_later(gone)
        return self._mover.export(self._buffer.memory)

    # --- lent ---

    def lend(self, lender: int, id: int, held: HeldBlock, until_s: float, source: str = "") -> int | PoolError:
        """Pin a block for a client of connection `lender`; returns its offset. A block that is not returned in time is
        freed: this is safe, as the client verifies what it reads."""
        lent = _Lent(held, lender, source)
        with self._lock:
            same = self._forget((lender, id))
            why = self._refusal(lender, source)
            if why is None:
                self._lent[lender, id] = lent
                self._lent_of[lender] += 1
                self._lent_of[source] += 1
                left_s = min(until_s - time.monotonic(), LEND_S_MAX)
                lent.deadline = self._deadlines.after(left_s, partial(self._late, lender, id, lent))
        if same is not None:  # its id is used again: it will not be returned
            same.end()
        if why is not None:
            held.release()
            count_loss("blocks_not_lent")
            rare.warning("lent", "a block is not lent: %s", why)
            return PoolError("dropped", why)
        return self._buffer.offset(held)

    def _refusal(self, lender: int, source: str) -> str | None:
        blocks = self._buffer.blocks
        if len(self._lent) >= LENT_MAX:
            return f"{LENT_MAX} blocks are lent already"
        if self._lent_of[lender] >= max(blocks // 2, LENT_FEW):
            return f"{self._lent_of[lender]} blocks are lent to this connection already"
        if self._lent_of[source] >= max(blocks * 3 // 4, LENT_FEW):
            return f"{self._lent_of[source]} blocks are lent to this address already"
        return None

    def _forget(self, name: tuple[int, int]) -> _Lent | None:
        """Remove a lent block; the lock is held. The caller must call its `end`."""
        lent = self._lent.pop(name, None)
        if lent is not None:
            for whose in (lent.lender, lent.source):
                self._lent_of[whose] -= 1
                if not self._lent_of[whose]:
                    del self._lent_of[whose]
        return lent

    def _late(self, lender: int, id: int, lent: _Lent) -> None:
        with self._lock:
            if self._lent.get((lender, id)) is not lent:
                return
            self._forget((lender, id))
        count_loss("lent_blocks_taken_back")
        rare.warning("late", "a lent block was not returned in time: it is freed")
        lent.end()

    def returned(self, lender: int, id: int) -> None:
        """A client has finished reading a lent block."""
        with self._lock:
            lent = self._forget((lender, id))
        if lent is not None:
            lent.end()

    def gone(self, lender: int) -> None:
        """The connection ended: free the blocks lent to it."""
        with self._lock:
            names = [name for name in self._lent if name[0] == lender] if self._lent_of[lender] else []
            blocks = [self._forget(name) for name in names]
        for lent in blocks:
            if lent is not None:
                lent.end()

    # --- offered ---

    def take(
        self,
        offer: wire.Offer,
        into: memoryview,
        deadline_s: float,
        ended: Callable[[PoolError | None], None],
    ) -> None:
        """Read an offered block into `into`; `ended` is called on another thread."""
        with self._lock:
            remote, _ = self._clients.get(offer.client, (None, ""))

        def check(data: memoryview) -> PoolError | None:
            return self._buffer.check(offer.key, data, offer.checksum, offer.mac)

        def move() -> None:
            if remote is None:
                ended(PoolError("layout", "the memory of that engine is not attached"))
            else:
                ended(read_one_sided(remote, offer.offset, into, deadline_s, check))

        if not self._moves.put(move, lambda error: ended(PoolError("network", f"a one-sided read failed: {error}"))):
            count_loss("one_sided_dropped")
            rare.warning("moves", "a block is not read one-sided: %d moves wait already", MOVES_WAITING_MAX)
            ended(PoolError("dropped", f"{MOVES_WAITING_MAX} one-sided moves wait already"))

    def _close_later(self, remote: RemoteMemory) -> None:
        """Close the memory after its queued reads; at once when the queue is full or closed."""
        if not self._moves.put(remote.close):
            remote.close()

    def close(self, timeout_s: float) -> None:
        """End everything that is lent, then the deadlines, within about `timeout_s`."""
        with self._lock:
            clients, self._clients = list(self._clients.values()), OrderedDict()
            lent, self._lent = list(self._lent.values()), {}
            self._lent_of.clear()
        for one in lent:
            one.end()
        self._deadlines.close(timeout_s)
        for remote, _ in clients:
            self._close_later(remote)
        if not self._moves.put(self._mover.close):
            log.warning("the memory of one-sided reads is not freed: too many reads wait")
        self._moves.close(timeout_s)
