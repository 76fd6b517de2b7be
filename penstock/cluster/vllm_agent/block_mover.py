"""Blocks between the staging memory of vLLM's connector, which the agent maps, and relays of decode engines."""

from __future__ import annotations

import logging
import mmap
import os
import time
from collections.abc import Callable
from functools import partial

from penstock.cluster.agent_wire import Moved, ReadBlock, SendBlock, Staging
from penstock.cluster.handoff.relay_links import RelayLinks
from penstock.cluster.wire_types import clip
from penstock.core.new_block import NewBlock
from penstock.framing import ProtocolError
from penstock.io.sealed_memory import check_sealed
from penstock.pool.api import Done, PoolError
from penstock.process.guarded_thread import GuardedWorker
from penstock.process.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

SENDS_WAITING_MAX = 4096  # the windows of the connector's scheduler core keep far fewer under way

Reply = Callable[[Moved], None]


class BlockMover:
    """Of one agent; any thread may call. Links are made with the first block where none is open. Each order gets one
    reply, on any thread."""

    def __init__(self, links: RelayLinks) -> None:
        self._links = links
        self._sends = GuardedWorker("penstock-hand-off", SENDS_WAITING_MAX)  # checksums take time
        self._memory = memoryview(b"")

    def use(self, staging: Staging, descriptor: int | None) -> None:
        """Map the memory of a connector. Raises ProtocolError, and closes the descriptor."""
        if descriptor is None:
            raise ProtocolError("staging memory was named without its descriptor")
        try:
            check_sealed(descriptor, staging.size_bytes)
            self._memory = memoryview(mmap.mmap(descriptor, staging.size_bytes, flags=mmap.MAP_SHARED))
        except (OSError, ValueError) as error:
            raise ProtocolError(f"the connector's staging memory cannot be mapped: {error}") from None
        finally:
            os.close(descriptor)

    def read(self, order: ReadBlock, reply: Reply) -> None:
        """Carry out the order."""
        done = partial(_answer, order.id, reply)
        into = self._place(order)
        if into is None:
            done(PoolError("device", "the block lies outside of staging memory"))
            return
        read = partial(self._links.read, order.relay, order.key, order.size_bytes, into, order.timeout_s, done)
        self._when_connected(order.relay, read, done)

    def send(self, order: SendBlock, reply: Reply) -> None:
        """Carry out the order, unless its time is over before its turn comes."""
        done = partial(_answer, order.id, reply)
        data = self._place(order)
        if data is None:
            done(PoolError("device", "the block lies outside of staging memory"))
            return
        block = NewBlock(order.key, order.parent, order.size_bytes, order.position, order.tenant, order.rebuild_s)

        def begin() -> None:
            if time.monotonic() > order.until_s:
                done(PoolError("deadline", "its turn to be sent came too late"))
                return
            self._links.hand_over(order.relay, block, data, order.timeout_s, done)

        def failed(error: Exception) -> None:
            done(error if isinstance(error, PoolError) else PoolError("device", repr(error)))

        def put() -> None:
            if not self._sends.put(begin, failed):
                done(PoolError("dropped", f"{SENDS_WAITING_MAX} blocks wait to be sent, or the agent is closing"))

        self._when_connected(order.relay, put, done)

    def _place(self, order: ReadBlock | SendBlock) -> memoryview | None:
        end = order.offset + order.size_bytes
        return self._memory[order.offset : end] if end <= len(self._memory) else None

    def _when_connected(self, address: str, then: Callable[[], None], done: Done) -> None:
        if self._links.is_known(address):
            then()
        else:
            self._links.connect(address, then, done)

    def close(self, timeout_s: float) -> None:
        """End its thread; the links are the owner's to close."""
        self._sends.close(timeout_s)


def _answer(order_id: int, reply: Reply, error: PoolError | None) -> None:
    reply(Moved(order_id) if error is None else Moved(order_id, error.reason, clip(error.detail)))
