"""The prefill engine's side of one-sided reads: it reads blocks that relays lend, and offers its own to be read."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from penstock.core.keys import BlockKey
from penstock.io.memory import address_of
from penstock.pool.api import Done, PoolError
from penstock.pool.callbacks import call_done
from penstock.pool.checksum import block_checksum
from penstock.pool.losses import count_loss
from penstock.pool.mac import PoolKey, block_mac, check_block
from penstock.pool.net import wire
from penstock.pool.net.link import NodeLink
from penstock.pool.net.one_sided import Mover, RemoteMemory
from penstock.process.guarded_thread import GuardedWorker
from penstock.process.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

MOVES_WAITING_MAX = 4096

ATTACH_TIMEOUT_S = 5.0
_BROKEN = ("network", "closed", "layout", "checksum")  # errors after which the attached memory may not exist any more


class OneSidedLinks:
    """Relays whose memory is attached, by address. Any thread may call; blocks are moved on a thread of this class."""

    def __init__(self, mover: Mover, pool_key: PoolKey | None = None) -> None:
        self._mover = mover
        self._pool_key = pool_key
        self._client = os.urandom(16)
        self._memory = memoryview(b"")
        self._base = 0
        self._lock = threading.Lock()
        self._remote: dict[str, RemoteMemory | None] = {}  # None: being attached
        self._moves = GuardedWorker("penstock-one-sided", waiting_max=MOVES_WAITING_MAX)

    def allocate(self, size_bytes: int) -> memoryview:
        """Allocate the engine's staging memory."""
        self._memory = self._mover.allocate(size_bytes)
        self._base = address_of(self._memory)
        return self._memory

    def attach(self, address: str, link: NodeLink) -> None:
        """Request a relay's memory, unless that was done. Until it is attached, blocks are sent in messages."""
        with self._lock:
            if address in self._remote or not len(self._memory):
                return
            self._remote[address] = None

        def ended(reply: Any, error: PoolError | None) -> None:
            try:
                if error is not None:
                    raise error
                remote = self._mover.attach(reply.memory)
            except Exception as failed:  # noqa: BLE001 (of any transport: blocks are sent in messages)
                count_loss("one_sided_not_attached")
                rare.warning(f"attach {address}", "%s: blocks are sent in messages: %s", address, failed)
                if not isinstance(failed, PoolError) or failed.reason != "layout":
                    self.drop(address)  # tried again with the next hand-off
                return
            with self._lock:
                wanted = address in self._remote
                if wanted:
                    self._remote[address] = remote
            if not wanted:  # the link was dropped meanwhile
                self._close_later(remote)

        message = wire.Attach(link.next_id(), self._client, self._mover.kind, self._mover.export(self._memory), 0.0)
        link.begin(message, ATTACH_TIMEOUT_S, ended)

    def drop(self, address: str) -> None:
        """Detach a relay's memory, as another relay may have its address by now; the next hand-off attaches it
        again."""
        with self._lock:
            remote = self._remote.pop(address, None)
        if remote is not None:
            self._close_later(remote)

    def _close_later(self, remote: RemoteMemory) -> None:
        """Close the memory after its queued reads; at once when the queue is full or closed."""
        if not self._moves.put(remote.close):
            remote.close()

    def read(
        self,
        address: str,
        link: NodeLink,
        key: BlockKey,
        size_bytes: int,
        into: memoryview,
        timeout_s: float,
        done: Done,
    ) -> bool:
        """Have a block lent, and read it; False when the relay's memory is not attached."""
        with self._lock:
            remote = self._remote.get(address)
        if remote is None:
            return False
        deadline_s = time.monotonic() + timeout_s
        message = wire.Lend(link.next_id(), key, size_bytes, 0.0)

        def lent(reply: Any, error: PoolError | None) -> None:
            if error is None and not isinstance(reply, wire.Lent):
                error = PoolError("network", f"{address} answered with {type(reply).__name__}")
            if error is not None:
                self._end(address, done, error)
                return
            move = partial(self._move, address, link, remote, message, reply, into, deadline_s, done)
            if not self._moves.put(move, lambda error: self._end(address, done, PoolError("network", repr(error)))):
                link.tell(wire.Return(message.id))
                count_loss("one_sided_dropped")
                rare.warning("moves", "a block is not read one-sided: %d moves wait already", MOVES_WAITING_MAX)
                self._end(address, done, PoolError("dropped", f"{MOVES_WAITING_MAX} one-sided moves wait already"))

        link.begin(message, timeout_s, lent)
        return True

    def _move(
        self,
        address: str,
        link: NodeLink,
        remote: RemoteMemory,
        asked: wire.Lend,
        reply: wire.Lent,
        into: memoryview,
        deadline_s: float,
        done: Done,
    ) -> None:
        def check(data: memoryview) -> PoolError | None:
            return check_block(self._pool_key, asked.key, data, reply.checksum, reply.mac)

        error = read_one_sided(remote, reply.offset, into[: asked.size_bytes], deadline_s, check)
        link.tell(wire.Return(asked.id))
        self._end(address, done, error)

    def offer(
        self, address: str, link: NodeLink, key: BlockKey, data: memoryview, timeout_s: float, done: Done
    ) -> bool:
        """Have the relay read a block; False when it cannot, or when the block is not in the staging memory."""
        with self._lock:
            remote = self._remote.get(address)
        offset = address_of(data) - self._base
        if remote is None or not 0 <= offset <= len(self._memory) - len(data):
            return False
        checksum = block_checksum(key, data)
        mac = block_mac(self._pool_key, key, data)
        message = wire.Offer(link.next_id(), self._client, key, len(data), checksum, offset, 0.0, mac)

        def ended(reply: Any, error: PoolError | None) -> None:
            if error is None and not isinstance(reply, wire.Written):
                error = PoolError("network", f"{address} answered with {type(reply).__name__}")
            self._end(address, done, error)

        link.begin(message, timeout_s, ended)
        return True

    def _end(self, address: str, done: Done, error: PoolError | None) -> None:
        if error is not None and error.reason in _BROKEN:
            self.drop(address)
        call_done(done, error)

    def close(self, timeout_s: float) -> None:
        """Close all memory; to be called after the links are closed."""
        with self._lock:
            remote, self._remote = list(self._remote.values()), {}
        for memory in remote:
            if memory is not None:
                self._close_later(memory)
        if not self._moves.put(self._mover.close):
            log.warning("the memory of one-sided reads is not freed: too many reads wait")
        self._moves.close(timeout_s)


def read_one_sided(
    remote: RemoteMemory,
    offset: int,
    into: memoryview,
    deadline_s: float,
    check: Callable[[memoryview], PoolError | None],
) -> PoolError | None:
    """Read a block from a peer's memory and verify it by `check`; returns the error, or None."""
    remaining_s = deadline_s - time.monotonic()
    if remaining_s <= 0:
        return PoolError("deadline", "the deadline passed before a one-sided read's turn")
    try:
        remote.read(offset, into, remaining_s)
    except PoolError as error:
        return error
    except Exception as error:  # of any transport: the block did not arrive
        log.exception("a one-sided read raised")
        return PoolError("network", f"a one-sided read failed: {error}")
    return check(into)
