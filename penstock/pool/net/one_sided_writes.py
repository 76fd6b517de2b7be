"""A client's side of one-sided writes to a pool node: it has space granted, fills it, and commits it.

A span of blocks of one size is one grant. What is more than the node grants one client waits. The node verifies what
lies there by the checksums of the commit before it stores it. What fails goes again in messages, within what is left of
the deadline.

WRITE-1  Statement: Each span ends exactly once: with the node's answer to its commit, in messages, or at its deadline.
WRITE-2  Statement: No transfer into granted space begins after the grant's time. The grant of one that goes on after
         the deadline is returned only when the agent has ended it; it is never committed.
Verification: tests/pool/net/test_one_sided_writes.py.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from penstock.core.layout import staging_bytes
from penstock.core.new_block import NewBlock
from penstock.core.pool.way_health import WayHealth
from penstock.core.spans import SPAN_BYTES_MAX
from penstock.io.memory import address_of
from penstock.pool.api import PoolError
from penstock.pool.losses import note_error
from penstock.pool.net import wire
from penstock.pool.net.link import NODE_MARGIN, NodeLink
from penstock.pool.net.memory_attachment import MemoryAttachment
from penstock.pool.net.ways import ONE_SIDED, count_written
from penstock.pool.spans import PartEnded

log = logging.getLogger(__name__)

SPAN_BYTES_MIN = 512 << 10  # of a smaller one, its three messages cost both sides more than its bytes in one
WAITING_MAX = 64  # spans
REFUSED_S = 0.05  # no space is asked for so long after the node had none

_OF_LINK = ("network", "deadline", "closed")  # ends of a message after which messages do no better


@dataclass(slots=True, eq=False)
class SpanWrite:
    """Blocks of one size and tenant to be written; `ended` is called once, with a result for each."""

    blocks: Sequence[NewBlock]
    datas: Sequence[memoryview]
    checksums: Sequence[int]
    deadline_s: float
    ended: PartEnded
    taken: bool = False  # its end, or its way on in messages, has been decided

    @property
    def length(self) -> int:
        """The space that it takes."""
        return len(self.blocks) * staging_bytes(self.blocks[0].size_bytes)

    def part(self, indexes: Sequence[int], ended: PartEnded) -> SpanWrite:
        """Some of its blocks."""
        blocks, datas = [self.blocks[at] for at in indexes], [self.datas[at] for at in indexes]
        return SpanWrite(blocks, datas, [self.checksums[at] for at in indexes], self.deadline_s, ended)


class OneSidedWrites:
    """One-sided writes to one node. Any thread may call."""

    def __init__(self, link: NodeLink, memory: MemoryAttachment, in_messages: Callable[[SpanWrite], None]) -> None:
        """`in_messages` writes a span in messages; it must not block."""
        self._link, self._memory, self._in_messages = link, memory, in_messages
        self._lock = threading.Lock()
        self._waiting: deque[SpanWrite] = deque()
        self._open: dict[SpanWrite, int] = {}  # spans that are under way, with their space
        self._open_bytes = 0
        self._refused_until_s = float("-inf")
        self._health = WayHealth()  # of writes alone: reads may work where they fail
        memory.watch(self)

    def write(self, span: SpanWrite) -> bool:
        """Begin to write a span; False where that cannot be done one-sided now, and must be done in messages."""
        size_bytes = span.blocks[0].size_bytes
        if not self._link.node.one_sided or not self._memory.ready([(data, size_bytes) for data in span.datas]):
            return False
        if not SPAN_BYTES_MIN <= span.length <= min(self._at_most(), SPAN_BYTES_MAX):
            return False
        now_s = time.monotonic()
        with self._lock:
            if now_s < self._refused_until_s or self._health.off(now_s) or len(self._waiting) >= WAITING_MAX:
                return False
            self._waiting.append(span)
        self._ask_next()
        return True

    def _at_most(self) -> int:
        """The bytes that the node grants one client at the same time; 0 where its memory is not attached."""
        attached = self._memory.attached
        return attached.memory.grant_bytes if attached is not None else 0

    def _ask_next(self) -> None:
        """Have space granted for spans that wait, as long as the node's limit allows it."""
        while True:
            at_most = self._at_most()
            with self._lock:
                while self._waiting and self._waiting[0].taken:
                    self._waiting.popleft()
                if not self._waiting or (at_most and self._open_bytes + self._waiting[0].length > at_most):
                    return
                span = self._waiting.popleft()
                if at_most:
                    self._open[span] = span.length
                    self._open_bytes += span.length
            if at_most:
                self._ask(span)
            else:
                self._give_up(span)

    def _ask(self, span: SpanWrite) -> None:
        self._memory.look_soon()
        self._memory.send_returns()
        now_s = time.monotonic()
        left_s = span.deadline_s - now_s
        grant = wire.Grant(self._link.next_id(), len(span.blocks), span.blocks[0].size_bytes, 0.0)
        until_s = now_s + min(left_s * (1 - NODE_MARGIN), wire.LEASE_S_MAX)  # as the node counts it, from a later time
        self._link.begin(grant, left_s, partial(self._granted, span, until_s))

    def _granted(self, span: SpanWrite, until_s: float, reply: Any, error: PoolError | None) -> None:
        if error is not None:
            self._asked_in_vain(span, error)
        elif not reply.lease:
            with self._lock:
                self._refused_until_s = time.monotonic() + REFUSED_S
            self._give_up(span)
        elif not self._memory.run(partial(self._fill, span, reply, until_s)):
            self._end_all(span, PoolError("closed", "the pool is closed"))

    def _asked_in_vain(self, span: SpanWrite, error: PoolError) -> None:
        """A Grant or a Commit has failed."""
        if error.reason in _OF_LINK:
            self._end_all(span, error, noted=True)
            return
        if error.reason != "dropped":  # the grant has run out, or too much waits at the node
            self._failed(error, detach=False)
        self._give_up(span)

    def _failed(self, error: PoolError, detach: bool) -> None:
        with self._lock:
            self._health.failed(time.monotonic())
        self._memory.failed(error, detach)

    # --- on the thread of the attachment ---

    def _fill(self, span: SpanWrite, granted: wire.Granted, until_s: float) -> None:
        """Write the blocks into the space that was granted."""
        attached, there = self._memory.attached, None
        if attached is not None and granted.epoch == attached.memory.epoch and time.monotonic() < until_s:
            there = attached.address(granted.region, granted.offset, span.length)
        if attached is not None and granted.epoch > attached.memory.epoch:
            self._memory.detach("the node's memory has changed", at_once=True)
        if attached is None or there is None or span.taken:
            self._memory.give_back([granted.lease])
            self._give_up(span)
            return
        size_bytes = span.blocks[0].size_bytes
        padded = staging_bytes(size_bytes)
        parts = [(address_of(data), there + at * padded, size_bytes) for at, data in enumerate(span.datas)]
        self._memory.begin("WRITE", attached, parts, partial(self._filled, span, granted.lease))

    def _filled(self, span: SpanWrite, lease: int, error: PoolError | None) -> None:
        """The transfer has ended."""
        if error is not None or span.taken:
            self._memory.give_back([lease])
        if error is not None:
            self._failed(error, detach=True)
            self._give_up(span)
        if error is not None or span.taken:
            return
        blocks = wire.WriteMany.of(0, span.blocks, span.checksums)
        commit = wire.Commit(self._link.next_id(), lease, blocks, 0.0)
        self._link.begin(commit, span.deadline_s - time.monotonic(), partial(self._committed, span, lease))

    def _committed(self, span: SpanWrite, lease: int, reply: Any, error: PoolError | None) -> None:
        """The node has stored the span, or some of its blocks, or says why not."""
        if error is None and len(reply.states) != len(span.blocks):
            error = PoolError("network", f"the node answered for {len(reply.states)} of {len(span.blocks)} blocks")
        if error is not None:
            self._memory.give_back([lease])  # where the node has not taken it, it is in quarantine
            self._asked_in_vain(span, error)
            return
        results = wire.errors_of(reply.states, reply.detail)
        damaged = [at for at, one in enumerate(results) if one is not None and one.reason == "checksum"]
        count_written(ONE_SIDED, span.blocks[0].size_bytes * results.count(None))
        if not damaged:
            self._health.succeeded()
            self._memory.succeeded()
            self._finish(span, results)
            return
        self._failed(PoolError("checksum", "blocks were not written as they were sent"), detach=False)
        if not self._take(span):
            return

        def again(errors: Sequence[PoolError | None]) -> None:
            for at, one in zip(damaged, errors, strict=True):
                results[at] = one
            span.ended(results)

        self._in_messages(span.part(damaged, again))

    @property
    def waits(self) -> bool:
        """As `memory_attachment.Watcher`."""
        return bool(self._open or self._waiting)

    def end_late(self, now_s: float) -> None:
        """As `memory_attachment.Watcher`: also of transfers that have not ended, which are never committed."""
        with self._lock:
            late = [span for span in (*self._open, *self._waiting) if span.deadline_s <= now_s]
        for span in late:
            self._end_all(span, PoolError("deadline", f"a one-sided write to {self._link.place} did not end in time"))

    # --- ends ---

    def _take(self, span: SpanWrite) -> bool:
        """Whether the caller decides how this span ends; nobody else does then."""
        with self._lock:
            first, span.taken = not span.taken, True
            length = self._open.pop(span, 0)
            self._open_bytes -= length
        if length:
            self._ask_next()
        return first

    def _give_up(self, span: SpanWrite) -> None:
        """Write a span in messages."""
        if not self._take(span):
            return
        if time.monotonic() < span.deadline_s:
            self._in_messages(span)
        else:
            self._call(span, PoolError("deadline", "nothing was left of the deadline to write in messages"))

    def _end_all(self, span: SpanWrite, error: PoolError, noted: bool = False) -> None:
        if self._take(span):
            if not noted:
                note_error("write", f"pool node {self._link.place}", error)
            self._call(span, error)

    def _call(self, span: SpanWrite, error: PoolError) -> None:
        span.ended([error] * len(span.blocks))

    def _finish(self, span: SpanWrite, results: list[PoolError | None]) -> None:
        if self._take(span):
            for one in results:
                note_error("write", f"pool node {self._link.place}", one)
            span.ended(results)

    def end_waiting(self) -> None:
        """End all spans: the pool is closed."""
        with self._lock:
            spans = [*self._waiting, *self._open]
        for span in spans:
            self._end_all(span, PoolError("closed", "the pool is closed"))
