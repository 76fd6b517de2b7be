"""Relays as the connector reaches them: its node agent moves the blocks, between them and staging memory."""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections.abc import Callable

from penstock.cluster.agent_wire import Moved, ReadBlock, SendBlock
from penstock.core.new_block import NewBlock
from penstock.io.memory import aligned_buffer
from penstock.pool.api import Done, PoolError
from penstock.pool.callbacks import call_done

GRACE_S = 2.0  # behind an order's timeout: an agent that works has answered by then


class AgentPeers:
    """Contract: `engine.peers.Peers`. An order ends by its timeout and GRACE_S, also where no answer comes."""

    def __init__(self, memory: memoryview, order: Callable[[ReadBlock | SendBlock], bool]) -> None:
        """`memory` is the staging memory that the agent maps; `order` says whether an agent got the message."""
        self._base = _address(memory)
        self._order = order
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._open: dict[int, tuple[float, Done]] = {}  # id -> when its memory may be used again, callback

    def allocate(self, size_bytes: int) -> memoryview:
        """Page-aligned memory."""
        return aligned_buffer(size_bytes)

    def read(self, address: str, key: bytes, size_bytes: int, into: memoryview, timeout_s: float, done: Done) -> None:
        """See Peers."""
        order = ReadBlock(next(self._ids), address, key, size_bytes, self._offset(into), timeout_s)
        self._begin(order, time.monotonic() + timeout_s + GRACE_S, done)

    def hand_over(self, address: str, block: NewBlock, data: memoryview, timeout_s: float, done: Done) -> None:
        """See Peers."""
        until_s = time.monotonic() + timeout_s
        order = SendBlock(
            id=next(self._ids),
            relay=address,
            key=block.key,
            parent=block.parent,
            size_bytes=block.size_bytes,
            position=block.position,
            tenant=block.tenant,
            rebuild_s=block.rebuild_s,
            offset=self._offset(data),
            timeout_s=timeout_s,
            until_s=until_s,
        )
        self._begin(order, until_s + GRACE_S, done)

    def _offset(self, view: memoryview) -> int:
        """Of a slot's memory; of memory elsewhere one that no agent takes."""
        offset = _address(view) - self._base
        return offset if offset >= 0 else 1 << 52

    def _begin(self, order: ReadBlock | SendBlock, end_s: float, done: Done) -> None:
        with self._lock:
            self._open[order.id] = end_s, done
        if not self._order(order):
            self.moved(Moved(order.id, "network", "the node agent does not answer"))

    def moved(self, message: Moved) -> None:
        """An order has ended."""
        with self._lock:
            _, done = self._open.pop(message.id, (0.0, None))
        if done is not None:
            reason = message.reason if message.reason in ("", *PoolError.REASONS) else "network"
            call_done(done, PoolError(reason, message.detail) if reason else None)

    def end_late(self) -> None:
        """End the orders whose answers were lost with the link to the agent."""
        now_s = time.monotonic()
        with self._lock:
            late = [order_id for order_id, (end_s, _) in self._open.items() if end_s <= now_s]
        for order_id in late:
            self.moved(Moved(order_id, "deadline", "the node agent did not answer in time"))


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
