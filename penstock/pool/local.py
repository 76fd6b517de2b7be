"""The embedded pool: members in this process behind the one interface of `pool.api`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Protocol

from penstock.core.keys import BlockKey
from penstock.core.new_block import NewBlock
from penstock.pool.api import Done, Located, MemberStat, PoolError, PoolStat, check_write
from penstock.pool.callbacks import Callbacks, call_done
from penstock.pool.checksum import block_checksum
from penstock.pool.memory import MemoryMember
from penstock.pool.table import Block, Table
from penstock.pool.work import Work

log = logging.getLogger(__name__)


class Member(Protocol):
    """What the pool asks of a member. `put` and the notes of rows return at once."""

    name: str
    kind: str
    capacity_bytes: int
    start_offset: int
    notes: list[str]
    read_bytes: int
    written_bytes: int
    errors: int

    @property
    def barrier(self) -> int: ...
    @property
    def refuses_stores(self) -> str | None: ...
    def start(self) -> None: ...
    def put(self, work: Work) -> PoolError | None: ...
    def register(self, buffer: memoryview) -> None: ...
    def rows(self) -> list[tuple[Block, int]]: ...
    def forget(self, blocks: Iterable[Block]) -> None: ...
    def record(self, block: Block, use: int) -> None: ...
    def used(self, uses: Iterable[tuple[BlockKey, int]]) -> None: ...
    def close(self, timeout_s: float) -> None: ...


class OpenBlock:
    """A pinned block: it stays where it is until `release`. `view` is its bytes in place, for memory members."""

    __slots__ = ("_pool", "block", "member_name", "view")

    def __init__(self, pool: LocalPool, block: Block, member_name: str, view: memoryview | None) -> None:
        self._pool: LocalPool | None = pool
        self.block = block
        self.member_name = member_name
        self.view = view

    def release(self) -> None:
        """Undo the pin; later calls do nothing. The view must not be used any more."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool._unpin(self.block)


class MemoryLease:
    """A block of a memory member in place (`pool.api.Lease`). Its bytes must not be changed."""

    __slots__ = ("_opened", "_view")

    def __init__(self, opened: OpenBlock, view: memoryview) -> None:
        self._opened = opened
        self._view = view

    @property
    def view(self) -> memoryview:
        return self._view

    def release(self) -> None:
        self._opened.release()


class LocalPool:
    """Members in this process. Contract: `pool.api.Pool`.

    One gap against it: bytes that a device is already moving cannot be cut off; such a read or write is reported when
    the device answers, at the latest by `close`. A device that does not answer for 10 s is fenced.
    """

    def __init__(self, members: Sequence[Member], weights: Sequence[float]) -> None:
        """Takes the members over. `weights` are their shares of new blocks (any scale, such as bytes per second)."""
        if not members or len(members) != len(weights):
            raise ValueError(f"{len(members)} members and {len(weights)} weights; at least one, and as many of each")
        self.members = list(members)
        self.notes = [note for member in members for note in member.notes]
        self._lock = threading.Lock()
        ranges = [(member.start_offset, member.capacity_bytes) for member in members]
        self._table = Table(ranges, weights)
        self._closed = False
        self._writes_dropped = self._evictions = self._checksum_errors = 0
        self._callbacks = Callbacks()
        self._restore()
        for member in self.members:
            member.start()

    # --- the interface ---

    def register(self, buffer: memoryview) -> None:
        for member in self.members:
            member.register(buffer)

    def lookup(self, keys: Sequence[BlockKey], timeout_s: float) -> list[Located | None]:
        found: list[Located | None] = []
        uses: dict[int, list[tuple[BlockKey, int]]] = {}
        with self._lock:
            self._check_open()
            self._check_health()
            for key in keys:
                block = self._table.find(key)
                if block is None:
                    found.append(None)
                    continue
                self._table.touch(block)
                uses.setdefault(block.member, []).append((key, self._table.uses))
                found.append(Located(block.size_bytes, (self.members[block.member].name,)))
            for member, noted in uses.items():
                self.members[member].used(noted)
        return found

    def read(self, key: BlockKey, size_bytes: int, into: memoryview, timeout_s: float, done: Done) -> None:
        opened = self.open_block(key, size_bytes)
        if isinstance(opened, PoolError):
            self._callbacks.call(done, opened)
            return

        def finished(error: PoolError | None) -> None:
            if error is None and opened.view is None:
                error = self.verify(opened.block, into)
            opened.release()
            call_done(done, error)

        self.load(opened, into, timeout_s, finished)

    def lease(self, key: BlockKey) -> MemoryLease | None:
        opened = self.open_block(key, None)
        if isinstance(opened, PoolError):
            return None
        if opened.view is None:
            opened.release()
            return None
        self.note_read(opened)
        return MemoryLease(opened, opened.view)

    def host_buffers(self) -> list[memoryview]:
        return [member.memory for member in self.members if isinstance(member, MemoryMember)]

    def write(self, new: NewBlock, data: memoryview, timeout_s: float, done: Done) -> None:
        error = check_write(new, data)
        if error is None:
            try:
                block, error = self._reserve(new)
            except PoolError as closed:
                block, error = None, closed
            if block is not None:
                after = self.members[block.member].barrier
                deadline_s = time.monotonic() + timeout_s
                work = Work("store", block, data, deadline_s, lambda w, e: self._stored(w.block, done, e), after)
                error = self.members[block.member].put(work)
                if error is None:
                    return
                with self._lock:
                    self._table.abandon(block)
            elif error is None:
                self._callbacks.call(done, None)
                return
        with self._lock:
            self._writes_dropped += 1
        self._callbacks.call(done, error)

    def evict(self, keys: Sequence[BlockKey]) -> int:
        with self._lock:
            found = {key: block for key in keys if (block := self._table.evictable(key)) is not None}
            for block in found.values():
                self._doom(block)
            self._evictions += len(found)
        return len(found)

    def stat(self, timeout_s: float) -> PoolStat:
        with self._lock:
            self._check_health()
            table = self._table
            members = tuple(
                MemberStat(
                    name=member.name,
                    kind=member.kind,
                    capacity_bytes=member.capacity_bytes,
                    used_bytes=table.allocators[i].end - table.allocators[i].start - table.allocators[i].free_bytes,
                    blocks=table.counts[i],
                    healthy=table.healthy[i],
                    weight=table.placement.weights[i],
                    read_bytes=member.read_bytes,
                    written_bytes=member.written_bytes,
                    errors=member.errors,
                )
                for i, member in enumerate(self.members)
            )
            return PoolStat(members, self._writes_dropped, self._evictions, self._checksum_errors)

    def close(self, timeout_s: float) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        deadline_s = time.monotonic() + timeout_s
        for member in self.members:
            member.close(max(0.1, deadline_s - time.monotonic()))
        self._callbacks.close(max(0.1, deadline_s - time.monotonic()))

    # --- for a pool node: blocks whose bytes the other side verifies ---

    def open_block(self, key: BlockKey, size_bytes: int | None) -> OpenBlock | PoolError:
        """Pin a block of `size_bytes` (None: of any size), or say why it cannot be read."""
        with self._lock:
            if self._closed:
                return PoolError("closed", "the pool is closed")
            self._check_health()
            block = self._table.find(key)
            if block is None:
                return PoolError("missing", f"block {key.hex()} is not in the pool")
            if size_bytes is not None and block.size_bytes != size_bytes:
                return PoolError(
                    "layout", f"block {key.hex()} has {block.size_bytes} bytes, {size_bytes} were asked for"
                )
            self._table.pin(block)
            member = self.members[block.member]
        view = member.view(block) if isinstance(member, MemoryMember) else None
        return OpenBlock(self, block, member.name, view)

    def note_read(self, opened: OpenBlock) -> None:
        """Count a block that was read in place."""
        self.members[opened.block.member].read_bytes += opened.block.size_bytes

    def load(self, opened: OpenBlock, into: memoryview, timeout_s: float, done: Done) -> None:
        """Copy an open block into `into` without verifying it. A device error drops the block."""
        block = opened.block

        def finished(work: Work, error: PoolError | None) -> None:
            if error is not None and error.reason == "device":
                self._drop(block)
            call_done(done, error)

        work = Work("load", block, into, time.monotonic() + timeout_s, finished)
        error = self.members[block.member].put(work)
        if error is not None:
            self._callbacks.call(done, error)

    def verify(self, block: Block, data: memoryview) -> PoolError | None:
        """Check bytes that came from a device; a mismatch drops the block and is counted."""
        if block_checksum(block.key, data[: block.size_bytes]) == block.checksum:
            return None
        self.discard(block.key, block.checksum)
        name = self.members[block.member].name
        return PoolError("checksum", f"block {block.key.hex()} on {name} does not match its checksum")

    def discard(self, key: BlockKey, checksum: int) -> None:
        """Drop a block that a reader found to differ from `checksum`; ignored when another block has taken its key."""
        with self._lock:
            block = self._table.find(key)
            if block is not None and block.checksum == checksum:
                self._checksum_errors += 1
                self._doom(block)
        log.warning("block %s did not match its checksum and was dropped", key.hex())

    def check_integrity(self) -> None:
        """Assert the invariants of the table; for tests and idle moments."""
        with self._lock:
            self._table.check_integrity()

    # --- inside; the lock is held where the name does not say otherwise ---

    def _restore(self) -> None:
        rows: list[tuple[int, Block]] = []
        for number, member in enumerate(self.members):
            for block, use in member.rows():
                block.member = number
                rows.append((use, block))
        rows.sort(key=lambda row: row[0])
        lost: dict[int, list[Block]] = {}
        for _, block in rows:
            if not self._table.restore(block):
                lost.setdefault(block.member, []).append(block)
        self._table.uses = max([self._table.uses, *(use for use, _ in rows)])
        for number, blocks in lost.items():
            self.notes.append(f"{self.members[number].name}: {len(blocks)} rows beyond the slab or doubled, dropped")
            self.members[number].forget(blocks)

    def _reserve(self, new: NewBlock) -> tuple[Block | None, PoolError | None]:
        """An extent for a new block; neither block nor error when the block is there already. Takes the lock."""
        with self._lock:
            self._check_open()
            self._check_health()
            present = self._table.find(new.key)
            if present is not None:
                self._table.touch(present)
                if present.size_bytes == new.size_bytes:
                    return None, None
                return None, PoolError("layout", f"block {new.key.hex()} exists with {present.size_bytes} bytes")
            if self._table.occupied(new.key):
                return None, PoolError("dropped", f"block {new.key.hex()} is being written or dropped already")
            refused = {n: why for n, member in enumerate(self.members) if (why := member.refuses_stores)}
            if len(refused) == len(self.members):
                return None, PoolError("device", "; ".join(refused.values()))
            block, gone = self._table.reserve(new, refused)
            self._evictions += len(gone)
            for number in {old.member for old in gone}:
                self.members[number].forget([old for old in gone if old.member == number])
            if block is None:
                return None, PoolError("full", f"no member has room for {new.size_bytes} bytes that are not in use")
            return block, None

    def _stored(self, block: Block, done: Done, error: PoolError | None) -> None:
        """The end of a store, on its member's thread. Takes the lock."""
        with self._lock:
            if error is None:
                self._table.commit(block)
                self.members[block.member].record(block, self._table.last_use(block.key))
            else:
                self._table.abandon(block)
                self._writes_dropped += 1
        call_done(done, error)

    def _unpin(self, block: Block) -> None:
        """Takes the lock."""
        with self._lock:
            if self._table.unpin(block):
                self.members[block.member].forget([block])

    def _drop(self, block: Block) -> None:
        """Make a block that could not be read a miss. Takes the lock."""
        with self._lock:
            if self._table.find(block.key) is block:
                self._doom(block)

    def _doom(self, block: Block) -> None:
        if self._table.doom(block):
            self.members[block.member].forget([block])

    def _check_open(self) -> None:
        if self._closed:
            raise PoolError("closed", "the pool is closed")

    def _check_health(self) -> None:
        for number, member in enumerate(self.members):
            if self._table.healthy[number] and getattr(member, "fenced", None):
                self._table.fence(number)
