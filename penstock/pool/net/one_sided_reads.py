"""A client's side of one-sided reads from a pool node: it has blocks lent, reads them, and verifies them; on a device,
where they landed in its memory (`pool.device_twin`).

Reads that are submitted while others are being lent travel together, as one LendMany. Every block is verified, by the
same check as one that came in a message. A read that fails, or whose bytes do not pass the check, is made again in
messages, within what is left of its deadline.

READ-1  Statement: Each read ends exactly once: by its check, in messages, or at its deadline.
READ-2  Statement: A read that the agent has begun ends only after the agent has ended it, also after its deadline:
        until then bytes may still arrive in its buffer.
Verification: tests/pool/net/test_one_sided_reads.py, tests/pool/net/test_one_sided_faults.py.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from penstock.core.keys import BlockKey
from penstock.io.memory import address_of
from penstock.pool.api import PoolError, ReadCheck
from penstock.pool.device_twin import DeviceTwin
from penstock.pool.losses import note_error
from penstock.pool.mac import check_of
from penstock.pool.net import wire
from penstock.pool.net.link import NodeLink
from penstock.pool.net.memory_attachment import MemoryAttachment
from penstock.pool.net.one_sided_agent import Span
from penstock.pool.net.ways import DEVICE, ONE_SIDED, count_read
from penstock.process.guarded_thread import GuardedWorker

log = logging.getLogger(__name__)

SPAN_BYTES_MAX = 32 << 20  # of the blocks that are lent together, if they are several
AHEAD_BYTES_MAX = 16 << 20  # with more on their way, or more than wait, blocks wait: several are lent by one message
TRANSFER_BYTES = 8 << 20  # a transfer has as many blocks; they are verified while the next is under way
OPEN_BYTES_MAX = 128 << 20  # of all blocks that are being lent or read
LENDS_MAX = 2  # LendMany without a complete answer
WAITING_MAX = 8192
VERIFY_BYTES = 1 << 20  # of blocks that are verified together
VERIFY_THREADS = 2

_OF_LINK = ("network", "deadline", "closed")  # ends of a LendMany that say nothing of one-sided reads
_OF_BLOCK = ("missing", "checksum")  # why a block is not lent that would be the answer in messages, too

Ended = Callable[[int, bytes, PoolError | None], None]  # checksum and MAC that the block was stored with


@dataclass(slots=True, eq=False)
class BlockRead:
    """A block to be read into `into`; `ended` is called once."""

    key: BlockKey
    size_bytes: int
    into: memoryview
    deadline_s: float
    ended: Ended
    check: ReadCheck | None
    taken: bool = False  # its end, or its way on in messages, has been decided
    counted: bool = False  # its bytes are among those that are being lent or read
    ahead: bool = False  # nor have they arrived
    twin: DeviceTwin | None = None  # where it lands, in place of `into`
    landing: int = 0  # its address there


_Lent = tuple[BlockRead, wire.LentBlock]


@dataclass(slots=True, eq=False)
class _Lend:
    """Blocks that are being lent together; those that the node has not answered yet."""

    open: dict[int, BlockRead]


class OneSidedReads:
    """One-sided reads from one node. Any thread may call."""

    def __init__(self, link: NodeLink, memory: MemoryAttachment, in_messages: Callable[[BlockRead], None]) -> None:
        """`in_messages` reads a block in messages; it must not block."""
        self._link, self._memory, self._in_messages = link, memory, in_messages
        self._lock = threading.Lock()
        self._waiting: deque[BlockRead] = deque()
        self._asked: set[BlockRead] = set()  # those of a LendMany that is not answered
        self._lends = self._waiting_bytes = self._open_bytes = self._ahead_bytes = 0
        self._verifying: GuardedWorker | None = None
        memory.watch(self)

    def read(self, blocks: Sequence[BlockRead]) -> bool:
        """Begin to read blocks; False where they cannot be read one-sided now, and must be read in messages."""
        if not self._link.node.one_sided or any(one.into.readonly for one in blocks):
            return False
        if not self._memory.ready([(one.into, one.size_bytes) for one in blocks]):
            return False
        with self._lock:
            if len(self._waiting) + len(blocks) > WAITING_MAX:
                return False
            self._waiting.extend(blocks)
            self._waiting_bytes += sum(one.size_bytes for one in blocks)
        self._lend_next()
        return True

    # --- lending ---

    def _lend_next(self) -> None:
        """Have blocks that wait lent, as long as the limits allow it."""
        while self._waiting:
            with self._lock:
                blocks = self._next_span()
                if not blocks:
                    return
                lend = _Lend(dict(enumerate(blocks)))
                self._lends += 1
                for one in blocks:
                    one.counted = one.ahead = True
                    self._open_bytes += one.size_bytes
                    self._ahead_bytes += one.size_bytes
                self._asked.update(blocks)
            self._memory.look_soon()
            keys, sizes = b"".join(one.key for one in blocks), [one.size_bytes for one in blocks]
            message = wire.LendMany(self._link.next_id(), keys, sizes, 0.0, self._memory.take_returns())
            left_s = max(one.deadline_s for one in blocks) - time.monotonic()
            self._link.begin(message, left_s, partial(self._lent_last, lend), partial(self._lent, lend))

    def _next_span(self) -> list[BlockRead]:
        """Take the blocks to be lent next; the lock is held."""
        if self._lends >= LENDS_MAX or self._open_bytes >= OPEN_BYTES_MAX:
            return []
        if self._ahead_bytes > min(AHEAD_BYTES_MAX, self._waiting_bytes):
            return []
        blocks: list[BlockRead] = []
        size_bytes = 0
        while self._waiting and len(blocks) < wire.LEND_BLOCKS_MAX:
            if self._waiting[0].taken:
                self._waiting_bytes -= self._waiting.popleft().size_bytes
                continue
            size_bytes += self._waiting[0].size_bytes
            if blocks and size_bytes > SPAN_BYTES_MAX:
                break
            blocks.append(self._waiting.popleft())
            self._waiting_bytes -= blocks[-1].size_bytes
        return blocks

    def _lent(self, lend: _Lend, reply: wire.LentMany) -> None:
        """The node has answered for some of the blocks."""
        if reply.hot:
            self._link.note_hot([lend.open[at].key for at in reply.hot if at in lend.open])
        with self._lock:
            blocks = [(one, block) for block in reply.blocks if (one := lend.open.pop(block.index, None)) is not None]
            self._asked.difference_update(one for one, _ in blocks)
        if not self._memory.run(partial(self._post, blocks, reply.epoch)):
            self._give_up(one for one, _ in blocks)

    def _lent_last(self, lend: _Lend, reply: Any, error: PoolError | None) -> None:
        """The last answer to a LendMany, or what it ended with."""
        if isinstance(reply, wire.LentMany):
            self._lent(lend, reply)
        with self._lock:
            self._lends -= 1
            rest, lend.open = list(lend.open.values()), {}
            self._asked.difference_update(rest)
        if rest and (error is None or error.reason not in _OF_LINK):
            why = error or PoolError("network", "the node did not answer for all blocks")
            self._memory.failed(why, detach=True)
        self._give_up(rest)
        self._lend_next()

    def _take(self, one: BlockRead) -> bool:
        """Whether the caller decides how this read ends; nobody else does then."""
        with self._lock:
            first, one.taken = not one.taken, True
            return first

    # --- on the thread of the attachment ---

    def _post(self, blocks: list[_Lent], epoch: int) -> None:
        """Read blocks that were lent; end those that were not, or read them in messages."""
        attached, twin = self._memory.attached, self._memory.twin
        readable: list[tuple[_Lent, Span]] = []
        refused: list[BlockRead] = []
        unused: list[int] = []
        for one, lent in blocks:
            there = None
            if lent.lease and attached is not None and epoch == attached.memory.epoch:
                there = attached.address(lent.region, lent.offset, one.size_bytes)
            if there is not None and not self._expired(one):
                readable.append(((one, lent), (_land(one, twin), there, one.size_bytes)))
                continue
            if lent.lease:
                unused.append(lent.lease)
            if not lent.lease and lent.reason in _OF_BLOCK:
                self._end(one, PoolError(lent.reason, f"block {one.key.hex()} of the pool of {self._link.place}"))
            else:
                refused.append(one)
        if unused:
            self._memory.give_back(unused)
        if attached is not None and epoch > attached.memory.epoch:
            self._memory.detach("the node's memory has changed", at_once=True)
        self._give_up(refused)
        readable.sort(key=lambda block: block[0][0].twin is not None)  # a transfer is into memory of one kind
        while readable and attached is not None:
            lands = readable[0][0][0].twin
            alike = itertools.takewhile(lambda block: block[0][0].twin is lands, readable)  # noqa: B023 (used at once)
            count = _together((span[2] for _, span in alike), TRANSFER_BYTES)
            some, readable = readable[:count], readable[count:]
            ended = partial(self._arrived, [block for block, _ in some])
            local = lands.memory if lands is not None else None
            self._memory.begin("READ", attached, [span for _, span in some], ended, local)

    def _expired(self, one: BlockRead) -> bool:
        """Whether the block must not be read any more: its deadline has passed. Else its transfer ends it."""
        if not self._take(one):
            return True
        if time.monotonic() < one.deadline_s:
            return False
        self._finish(one, 0, b"", PoolError("deadline", "the deadline passed before a one-sided read began"))
        return True

    def _arrived(self, blocks: list[_Lent], error: PoolError | None) -> None:
        """A transfer has ended: verify its blocks, or read them in messages."""
        self._memory.give_back([lent.lease for _, lent in blocks])
        with self._lock:
            for one, _ in blocks:
                self._not_ahead(one)
        if error is not None:
            self._memory.failed(error, detach=True)
            for one, _ in blocks:
                self._on_in_messages(one)
            return
        while blocks:
            together_bytes = VERIFY_BYTES if blocks[0][0].twin is None else TRANSFER_BYTES  # on the device by one call
            count = _together((one.size_bytes for one, _ in blocks), together_bytes)
            some, blocks = blocks[:count], blocks[count:]
            if not self._on_worker(partial(self._verify_some, some), partial(self._not_verified, some)):
                self._verify_some(some)

    def _on_worker(self, work: Callable[[], None], failed: Callable[[Exception], None]) -> bool:
        """Have a thread that verifies blocks do it; False where none can, or too much waits."""
        try:
            if self._verifying is None:
                self._verifying = GuardedWorker("penstock-one-sided-verify", WAITING_MAX, threads=VERIFY_THREADS)
            return self._verifying.put(work, failed)
        except (RuntimeError, MemoryError):  # the system starts no thread
            return False

    @property
    def waits(self) -> bool:
        """As `memory_attachment.Watcher`."""
        return bool(self._waiting or self._asked)

    def end_late(self, now_s: float) -> None:
        """As `memory_attachment.Watcher`."""
        with self._lock:
            late = [one for one in (*self._waiting, *self._asked) if one.deadline_s <= now_s and not one.taken]
        for one in late:
            self._end(one, PoolError("deadline", f"{self._link.place} did not lend the block in time"))

    # --- verification ---

    def _verify_some(self, blocks: list[_Lent]) -> None:
        self._lend_next()  # here, as the attachment's thread copies the next blocks
        if (twin := blocks[0][0].twin) is not None:
            self._verify_landed(twin, blocks)
            return
        for one, lent in blocks:
            try:
                self._verify(one, lent)
            except Exception as error:
                log.exception("a block that was read could not be verified")
                self._not_verified([(one, lent)], error)

    def _not_verified(self, blocks: list[_Lent], error: Exception) -> None:
        for one, _ in blocks:
            self._finish(one, 0, b"", PoolError("network", f"a block that was read was not verified: {error!r}"))

    def _verify(self, one: BlockRead, lent: wire.LentBlock) -> None:
        check = one.check or check_of(None, one.key)
        error = check(one.into[: one.size_bytes], lent.checksum, lent.mac)
        if error is None:
            self._verified(one, lent)
        elif error.reason == "mac":
            self._link.tell(wire.Corrupt(one.key, lent.checksum, lent.mac, True))
            self._finish(one, lent.checksum, lent.mac, error)
        else:  # the memory was used again, or the node is another one; in messages, damage is found out
            self._memory.failed(error, detach=False)
            self._on_in_messages(one)

    def _verified(self, one: BlockRead, lent: wire.LentBlock) -> None:
        self._memory.succeeded()
        error = None
        if time.monotonic() > one.deadline_s:
            error = PoolError("deadline", "a one-sided read ended after its deadline")
        else:
            count_read(ONE_SIDED if one.twin is None else DEVICE, one.size_bytes)
            if one.twin is not None:
                one.twin.landed(one.into)
        self._finish(one, lent.checksum, lent.mac, error)

    def _verify_landed(self, twin: DeviceTwin, blocks: list[_Lent]) -> None:
        """Verify blocks on the device. One that does not pass, or cannot be verified there, comes in messages."""
        try:
            found = twin.checksums([one.landing for one, _ in blocks], [one.key for one, _ in blocks])
        except RuntimeError as error:
            self._memory.twin_failed(PoolError("device", f"blocks could not be verified there: {error}"))
            for one, _ in blocks:
                self._on_in_messages(one)
            return
        for (one, lent), checksum in zip(blocks, found, strict=True):
            if checksum == lent.checksum:
                self._memory.twin_succeeded()
                self._verified(one, lent)
            else:
                self._memory.twin_failed(PoolError("checksum", f"block {one.key.hex()} does not match its checksum"))
                self._on_in_messages(one)

    # --- ends ---

    def _end(self, one: BlockRead, error: PoolError) -> None:
        """End a read whose transfer has not begun."""
        if self._take(one):
            note_error("read", f"pool node {self._link.place}", error)
            self._finish(one, 0, b"", error)

    def _give_up(self, blocks: Iterable[BlockRead]) -> None:
        """Read blocks in messages whose transfers have not begun."""
        for one in blocks:
            if self._take(one):
                self._on_in_messages(one)

    def _on_in_messages(self, one: BlockRead) -> None:
        if time.monotonic() >= one.deadline_s:  # one that is sent so late would cost its connection
            self._finish(one, 0, b"", PoolError("deadline", "nothing was left of the deadline to read in messages"))
            return
        self._freed(one)
        self._in_messages(one)

    def _finish(self, one: BlockRead, checksum: int, mac: bytes, error: PoolError | None) -> None:
        self._freed(one)
        try:
            one.ended(checksum, mac, error)
        except Exception:
            log.exception("the callback of a read failed")

    def _freed(self, one: BlockRead) -> None:
        """The block takes part in no limit any more."""
        with self._lock:
            self._not_ahead(one)
            if one.counted:
                one.counted = False
                self._open_bytes -= one.size_bytes
        self._lend_next()

    def _not_ahead(self, one: BlockRead) -> None:
        """The block is on its way no more; the lock is held."""
        if one.ahead:
            one.ahead = False
            self._ahead_bytes -= one.size_bytes

    def end_waiting(self) -> None:
        """End reads that wait: the pool is closed."""
        with self._lock:
            waiting, self._waiting, self._waiting_bytes = list(self._waiting), deque(), 0
        for one in waiting:
            self._end(one, PoolError("closed", "the pool is closed"))

    def close(self, timeout_s: float) -> None:
        """Verify what has arrived. To be called after the link and the attachment were closed."""
        self.end_waiting()
        if self._verifying is not None:
            self._verifying.close(timeout_s)


def _land(one: BlockRead, twin: DeviceTwin | None) -> int:
    """The local address that a block is read to: on the device where it has a place and no check of its own, which is
    the host's to make."""
    place = twin.place(one.into, one.size_bytes) if twin is not None and one.check is None else None
    if place is None:
        return address_of(one.into)
    one.twin, one.landing = twin, place
    return place


def _together(sizes: Iterable[int], at_most: int) -> int:
    """How many of the first ones have `at_most` bytes together; one at least."""
    count = sum_bytes = 0
    for size_bytes in sizes:
        if count and sum_bytes + size_bytes > at_most:
            break
        count, sum_bytes = count + 1, sum_bytes + size_bytes
    return count
