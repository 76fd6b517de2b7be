"""A relay's end of one-sided reads: it lends its blocks to prefill engines, and reads those that they offer."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from penstock.cluster.buffer import DecodeBuffer, HeldBlock
from penstock.cluster.one_sided_links import read_one_sided
from penstock.guarded_thread import GuardedWorker
from penstock.pool.api import PoolError
from penstock.pool.losses import count_loss
from penstock.rate_limited_log import RateLimitedLog
from penstock.transport import wire
from penstock.transport.one_sided import FarMemory, Mover

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

CLIENTS_MAX = 256
LENT_MAX = 4096
MOVES_WAITING_MAX = 4096


class Lending:
    """What is lent, and whose memory is attached. Any thread may call."""

    def __init__(self, mover: Mover, buffer: DecodeBuffer) -> None:
        self._mover = mover
        self._buffer = buffer
        self._lock = threading.Lock()
        self._clients: OrderedDict[bytes, FarMemory] = OrderedDict()
        self._lent: dict[tuple[int, int], tuple[float, HeldBlock]] = {}  # (lender, id) -> until when, block
        self._moves = GuardedWorker("penstock-relay-one-sided", waiting_max=MOVES_WAITING_MAX)

    def attach(self, client: bytes, kind: str, memory: bytes) -> bytes:
        """The buffer's description for the client, whose memory is attached. Raises PoolError."""
        if kind != self._mover.kind:
            raise PoolError("layout", f"this relay offers {self._mover.kind}, not {kind}")
        far = self._mover.attach(memory)
        old: list[FarMemory] = []
        with self._lock:
            if client in self._clients:
                old.append(self._clients.pop(client))
            self._clients[client] = far
            while len(self._clients) > CLIENTS_MAX:
                old.append(self._clients.popitem(last=False)[1])
        for gone in old:
            self._close_later(gone)
        return self._mover.export(self._buffer.memory)

    # --- lent ---

    def lend(self, lender: int, id: int, held: HeldBlock, until_s: float) -> int | PoolError:
        """Keep a block for a client of connection `lender`; returns its offset. The client verifies what it reads, so a
        block that was not returned in time may be taken back."""
        now_s = time.monotonic()
        with self._lock:
            late = [name for name, (end_s, _) in self._lent.items() if end_s < now_s]
            freed = [self._lent.pop(name)[1] for name in late]
            full = len(self._lent) >= LENT_MAX
            if not full:
                self._lent[lender, id] = (until_s, held)
        for block in freed:
            block.release()
        if full:
            held.release()
            count_loss("blocks_not_lent")
            rare.warning("lent", "a block is not lent: %d are lent already", LENT_MAX)
            return PoolError("dropped", f"{LENT_MAX} blocks are lent already")
        return self._buffer.offset(held)

    def returned(self, lender: int, id: int) -> None:
        with self._lock:
            lent = self._lent.pop((lender, id), None)
        if lent is not None:
            lent[1].release()

    def gone(self, lender: int) -> None:
        """The connection ended: nothing of it is lent any more."""
        with self._lock:
            names = [name for name in self._lent if name[0] == lender]
            blocks = [self._lent.pop(name)[1] for name in names]
        for block in blocks:
            block.release()

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
            far = self._clients.get(offer.client)

        def check(data: memoryview) -> PoolError | None:
            return self._buffer.check(offer.key, data, offer.checksum, offer.mac)

        def move() -> None:
            if far is None:
                ended(PoolError("layout", "the memory of that engine is not attached"))
            else:
                ended(read_one_sided(far, offer.offset, into, deadline_s, check))

        if not self._moves.put(move, lambda error: ended(PoolError("network", f"a one-sided read failed: {error}"))):
            count_loss("one_sided_dropped")
            rare.warning("moves", "a block is not read one-sided: %d moves wait already", MOVES_WAITING_MAX)
            ended(PoolError("dropped", f"{MOVES_WAITING_MAX} one-sided moves wait already"))

    def _close_later(self, far: FarMemory) -> None:
        """Close the memory after the queued reads of it; at once when the queue takes nothing more."""
        if not self._moves.put(far.close):
            far.close()

    def close(self, timeout_s: float) -> None:
        with self._lock:
            clients, self._clients = list(self._clients.values()), OrderedDict()
            lent, self._lent = [block for _, block in self._lent.values()], {}
        for block in lent:
            block.release()
        for far in clients:
            self._close_later(far)
        if not self._moves.put(self._mover.close):
            log.warning("the memory of one-sided reads is not given back: too many of them wait")
        self._moves.close(timeout_s)
