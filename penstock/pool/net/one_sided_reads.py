"""A client's side of one-sided reads from a pool node: it has blocks lent, reads them with NIXL, and verifies them.

Reads that are submitted while others are being lent travel together, as one LendMany and one read of NIXL. Every block
is verified, by the same check as one that came in a message. A read that fails, or whose bytes do not pass the check,
is made again in messages, within what is left of its deadline. After several failures in a row all reads go in
messages for a while (`core.pool.way_health`).

READ-1  Statement: Each read ends exactly once: by its check, in messages, or at its deadline.
READ-2  Statement: A read that NIXL has begun ends only after NIXL has ended it, also after its deadline: until then
        bytes may still arrive in its buffer.
READ-3  Statement: Every lease that was granted is returned, or runs out at the node.
Verification: tests/pool/net/test_one_sided_reads.py, tests/pool/net/test_one_sided_faults.py.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from penstock.core.config import ConfigError
from penstock.core.keys import BlockKey
from penstock.core.pool.way_health import OFF_S, WayHealth
from penstock.io.memory import address_of, aligned_buffer
from penstock.io.regions import Regions
from penstock.pool.api import PoolError, ReadCheck
from penstock.pool.losses import note_loss
from penstock.pool.mac import check_of
from penstock.pool.net import wire
from penstock.pool.net.link import NodeLink
from penstock.pool.net.nixl_agent import NixlAgent, NixlRead, Span, nixl_installed
from penstock.pool.net.pool_lending import NodeMemory, decode_node_memory
from penstock.pool.net.ways import ONE_SIDED, count_read
from penstock.process.guarded_thread import GuardedThread, GuardedWorker

log = logging.getLogger(__name__)

SPAN_BYTES_MAX = 16 << 20  # of the blocks that are lent together, if they are several
OPEN_BYTES_MAX = 128 << 20  # of all blocks that are being lent or read
LENDS_MAX = 2  # LendMany without a complete answer
WAITING_MAX = 8192
VERIFY_THREADS = 2
ATTACH_TIMEOUT_S = 5.0
PROBE_BYTES = 4096
POLL_S = (50e-6, 1e-3)  # pause between two looks at the reads under way; grows while nothing ends
LOOK_S = 0.05  # interval of the search for reads whose deadline has passed, while some wait

_OF_LINK = ("network", "deadline", "closed")  # ends of a LendMany that say nothing of one-sided reads

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


@dataclass(slots=True, eq=False)
class _Lend:
    """Blocks that are being lent together; those that the node has not answered yet."""

    open: dict[int, BlockRead]


@dataclass(slots=True, eq=False)
class _Reading:
    """Blocks that NIXL reads."""

    handle: NixlRead
    blocks: list[tuple[BlockRead, wire.LentBlock]]


@dataclass(slots=True, eq=False)
class _Attached:
    """The memory of a node, as one start of it described it."""

    peer: Any
    memory: NodeMemory
    node_id: bytes


class OneSidedReads:
    """One-sided reads from one node. Any thread may call. Its threads start when the node first offers such reads."""

    def __init__(self, link: NodeLink, in_messages: Callable[[BlockRead], None]) -> None:
        """`in_messages` reads a block in messages; it must not block."""
        self._link, self._in_messages = link, in_messages
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._buffers: list[memoryview] = []
        self._registered = Regions()
        self._registrations: list[Any] = []
        self._agent: NixlAgent | None = None
        self._attached: _Attached | None = None
        self._attaching = False
        self._scratch = memoryview(b"")  # what probes are read into
        self._probe: tuple[NixlRead, _Attached] | None = None  # a first read of memory that is being attached
        self._attach_after_s = float("-inf")
        self._health = WayHealth()
        self._waiting: deque[BlockRead] = deque()
        self._asked: set[BlockRead] = set()  # those of a LendMany that is not answered
        self._lends = self._open_bytes = 0
        self._tasks: deque[Callable[[], None]] = deque()
        self._reading: list[_Reading] = []  # of the thread alone
        self._thread: GuardedThread | None = None
        self._verifying: GuardedWorker | None = None
        self._closed = False
        self._why_not = "no block was read yet"

    @property
    def state(self) -> str:
        """How blocks are read one-sided, or "off: " and why they are not."""
        with self._lock:
            if not self._link.node.one_sided:
                return "off: the node does not offer it"
            if self._health.off(time.monotonic()):
                return f"off: {self._why_not}"
            if self._usable() is not None and self._agent is not None:
                return self._agent.transport
            return f"off: {self._why_not}"

    def register(self, buffer: memoryview) -> None:
        """Blocks will be read into this memory."""
        with self._lock:
            self._buffers.append(buffer)
            if self._agent is not None:
                self._tasks.append(partial(self._register, buffer))
                self._changed.notify()
            self._want_attach()

    def read(self, blocks: Sequence[BlockRead]) -> bool:
        """Begin to read blocks; False where they cannot be read one-sided now, and must be read in messages."""
        if not self._link.node.one_sided:
            return False
        with self._lock:
            if self._usable() is None:
                self._want_attach()
                return False
            full = len(self._waiting) + len(blocks) > WAITING_MAX
            if full or self._health.off(time.monotonic()) or not all(map(self._is_registered, blocks)):
                return False
            self._waiting.extend(blocks)
        self._lend_next()
        return True

    def _is_registered(self, one: BlockRead) -> bool:
        slot, room_bytes = self._registered.find(address_of(one.into))
        return slot >= 0 and one.size_bytes <= room_bytes and not one.into.readonly

    def _usable(self) -> _Attached | None:
        """The node's memory, if it is attached and of the node's present start; the lock is held."""
        attached = self._attached
        same = attached is not None and attached.node_id == self._link.node.node_id
        return attached if same and not self._closed else None

    # --- lending ---

    def _lend_next(self) -> None:
        """Have blocks that wait lent, as long as the limits allow it."""
        while True:
            with self._lock:
                blocks = self._next_span()
                if not blocks:
                    return
                lend = _Lend(dict(enumerate(blocks)))
                self._lends += 1
                for one in blocks:
                    one.counted = True
                    self._open_bytes += one.size_bytes
                self._asked.update(blocks)
                self._changed.notify()  # deadlines are watched from now on
            keys, sizes = b"".join(one.key for one in blocks), [one.size_bytes for one in blocks]
            message = wire.LendMany(self._link.next_id(), keys, sizes, 0.0)
            left_s = max(one.deadline_s for one in blocks) - time.monotonic()
            self._link.begin(message, left_s, partial(self._lent_last, lend), partial(self._lent, lend))

    def _next_span(self) -> list[BlockRead]:
        """Take the blocks to be lent next; the lock is held."""
        if self._lends >= LENDS_MAX or self._open_bytes >= OPEN_BYTES_MAX:
            return []
        blocks: list[BlockRead] = []
        size_bytes = 0
        while self._waiting and len(blocks) < wire.LEND_BLOCKS_MAX:
            if self._waiting[0].taken:
                self._waiting.popleft()
                continue
            size_bytes += self._waiting[0].size_bytes
            if blocks and size_bytes > SPAN_BYTES_MAX:
                break
            blocks.append(self._waiting.popleft())
        return blocks

    def _lent(self, lend: _Lend, reply: wire.LentMany) -> None:
        """The node has answered for some of the blocks."""
        with self._lock:
            blocks = [(one, block) for block in reply.blocks if (one := lend.open.pop(block.index, None)) is not None]
            self._asked.difference_update(one for one, _ in blocks)
            ends = self._closed  # the thread may have ended
            if not ends:
                self._tasks.append(partial(self._post, blocks, reply.epoch))
                self._changed.notify()
        if ends:
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
            self._failed(error or PoolError("network", "the node did not answer for all blocks"), detach=True)
        self._give_up(rest)
        self._lend_next()

    def _take(self, one: BlockRead) -> bool:
        """Whether the caller decides how this read ends; nobody else does then."""
        with self._lock:
            first, one.taken = not one.taken, True
            return first

    # --- on the thread ---

    def _run(self) -> None:
        pause_s = POLL_S[0]
        looked_s = 0.0
        while True:
            with self._lock:
                if not self._tasks:
                    watches = bool(self._waiting or self._asked)
                    polls = self._reading or self._probe is not None
                    self._changed.wait(pause_s if polls else LOOK_S if watches else None)
                tasks, self._tasks = self._tasks, deque()
                if self._closed and not tasks and not self._reading:
                    return
            for task in tasks:
                try:
                    task()
                except Exception as error:
                    self._failed(PoolError("network", f"one-sided reads failed: {error!r}"), detach=True)
                    log.exception("a task of one-sided reads failed")
            before = len(self._reading)
            self._poll()
            self._poll_probe()
            pause_s = POLL_S[0] if tasks or len(self._reading) < before else min(2 * pause_s, POLL_S[1])
            if time.monotonic() >= looked_s + LOOK_S:
                looked_s = time.monotonic()
                self._end_late(looked_s)

    def _post(self, blocks: list[tuple[BlockRead, wire.LentBlock]], epoch: int) -> None:
        """Read blocks that were lent, or that were not."""
        with self._lock:
            attached, agent = self._usable(), self._agent
        readable: list[tuple[BlockRead, wire.LentBlock]] = []
        spans: list[Span] = []
        refused: list[BlockRead] = []
        unused: list[int] = []
        for one, lent in blocks:
            there = None
            if lent.lease and attached is not None and epoch == attached.memory.epoch:
                there = _address(attached.memory, lent, one.size_bytes)
            if there is not None and not self._expired(one):
                readable.append((one, lent))
                spans.append((address_of(one.into), there, one.size_bytes))
                continue
            if lent.lease:
                unused.append(lent.lease)
            if not lent.lease and lent.reason == "missing":
                self._end(one, PoolError("missing", f"block {one.key.hex()} is not in the pool of {self._link.place}"))
            else:
                refused.append(one)
        if unused:
            self._link.tell(wire.ReturnMany(unused))
        if attached is not None and epoch > attached.memory.epoch:
            self._detach("the node's memory has changed", at_once=True)
        self._give_up(refused)
        if not readable:
            return
        try:
            assert agent is not None and attached is not None
            handle = agent.begin_read(attached.peer, spans)
        except PoolError as error:
            self._fell_through(readable, error)
            return
        self._reading.append(_Reading(handle, readable))

    def _expired(self, one: BlockRead) -> bool:
        """Whether the block must not be read any more: its deadline has passed. From here on it ends with NIXL."""
        if not self._take(one):
            return True
        if time.monotonic() < one.deadline_s:
            return False
        self._finish(one, 0, b"", PoolError("deadline", "the deadline passed before a one-sided read began"))
        return True

    def _poll(self) -> None:
        """Look at the reads under way."""
        reading, self._reading = self._reading, []
        for one in reading:
            try:
                if not one.handle.ended():
                    self._reading.append(one)
                    continue
            except PoolError as error:
                self._fell_through(one.blocks, error)
                continue
            self._link.tell(wire.ReturnMany([lent.lease for _, lent in one.blocks]))
            for block, lent in one.blocks:
                verify = partial(self._verify, block, lent)
                assert self._verifying is not None
                if not self._verifying.put(verify, partial(self._verify_failed, block)):
                    verify()

    def _fell_through(self, blocks: list[tuple[BlockRead, wire.LentBlock]], error: PoolError) -> None:
        """A read of NIXL failed: its blocks are read in messages."""
        self._link.tell(wire.ReturnMany([lent.lease for _, lent in blocks]))
        self._failed(error, detach=True)
        for one, _ in blocks:
            self._on_in_messages(one)

    def _end_late(self, now_s: float) -> None:
        """End reads that wait and whose deadline has passed."""
        with self._lock:
            late = [one for one in (*self._waiting, *self._asked) if one.deadline_s <= now_s and not one.taken]
        for one in late:
            self._end(one, PoolError("deadline", f"{self._link.place} did not lend the block in time"))

    # --- verification ---

    def _verify(self, one: BlockRead, lent: wire.LentBlock) -> None:
        check = one.check or check_of(None, one.key)
        error = check(one.into[: one.size_bytes], lent.checksum, lent.mac)
        if error is None:
            self._health.succeeded()
            if time.monotonic() > one.deadline_s:
                error = PoolError("deadline", "a one-sided read ended after its deadline")
            else:
                count_read(ONE_SIDED, one.size_bytes)
            self._finish(one, lent.checksum, lent.mac, error)
        elif error.reason == "mac":
            self._link.tell(wire.Corrupt(one.key, lent.checksum, lent.mac, True))
            self._finish(one, lent.checksum, lent.mac, error)
        else:  # the memory was used again, or the node is another one; in messages, damage is found out
            self._failed(error, detach=False)
            self._on_in_messages(one)

    def _verify_failed(self, one: BlockRead, error: Exception) -> None:
        self._finish(one, 0, b"", PoolError("network", f"a block that was read could not be verified: {error!r}"))

    # --- ends ---

    def _end(self, one: BlockRead, error: PoolError) -> None:
        """End a read that NIXL has not begun."""
        if self._take(one):
            self._finish(one, 0, b"", error)

    def _give_up(self, blocks: Iterable[BlockRead]) -> None:
        """Read blocks in messages that NIXL has not begun to read."""
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
            if one.counted:
                one.counted = False
                self._open_bytes -= one.size_bytes
        self._lend_next()

    def _failed(self, error: PoolError, detach: bool) -> None:
        """Count a failure, and detach from memory that may not be there any more."""
        if self._closed or error.reason == "closed":
            return
        note_loss(f"one_sided_{error.reason}", self._link.place, "%s: not read one-sided: %s", self._link.place, error)
        with self._lock:
            turned_off = self._health.failed(time.monotonic())
        if turned_off:
            log.warning("%s: blocks are read in messages for %g s", self._link.place, OFF_S)
        if detach or turned_off:
            self._detach(str(error), at_once=not turned_off)

    # --- attaching ---

    def _want_attach(self) -> None:
        """Begin to attach the node's memory, unless that is under way or failed a moment ago; the lock is held."""
        offered = bool(self._link.node.one_sided and self._buffers)
        if not offered or self._attaching or self._closed or self._usable() is not None:
            return
        if time.monotonic() < self._attach_after_s:
            return
        self._attaching = True
        if self._thread is None:
            self._thread = GuardedThread("penstock-one-sided-reads", self._run, restarts=True)
            self._verifying = GuardedWorker("penstock-one-sided-verify", WAITING_MAX, threads=VERIFY_THREADS)
            self._thread.start()
        self._tasks.append(self._attach)
        self._changed.notify()

    def _attach(self) -> None:
        """On the thread: prepare this side, then ask the node for its memory."""
        try:
            if not nixl_installed():
                raise ConfigError("NIXL is not installed here; allowed: penstock[nixl]")
            if self._agent is None:
                agent = NixlAgent()
                self._scratch = aligned_buffer(PROBE_BYTES)
                self._registrations.append(agent.register(self._scratch))
                with self._lock:
                    self._agent = agent
                    buffers = list(self._buffers)
                for buffer in buffers:
                    self._register(buffer)
            node_id = self._link.node.node_id
            message = wire.Attach(self._link.next_id(), b"", self._link.node.one_sided, b"", 0.0)

            def ended(reply: Any, error: PoolError | None) -> None:
                with self._lock:
                    self._tasks.append(partial(self._attached_now, node_id, reply, error))
                    self._changed.notify()

            self._link.begin(message, ATTACH_TIMEOUT_S, ended)
        except Exception as error:  # noqa: BLE001 (blocks are read in messages; it is tried again later)
            self._not_attached(error)

    def _attached_now(self, node_id: bytes, reply: Any, error: PoolError | None) -> None:
        """On the thread: the node has described its memory."""
        agent = self._agent
        assert agent is not None
        if self._reading:  # of memory that is detached; NIXL forgets a peer only after its reads
            with self._lock:
                self._tasks.append(partial(self._attached_now, node_id, reply, error))
                self._changed.wait(POLL_S[1])
            return
        try:
            if error is not None:
                raise error
            memory = decode_node_memory(reply.memory)
            with self._lock:
                old, self._attached = self._attached, None
            if old is not None:
                agent.remove_peer(old.peer)
            region = memory.regions[0]
            attached = _Attached(agent.add_peer(memory.metadata), memory, node_id)
            span = address_of(self._scratch), region.address, min(PROBE_BYTES, region.size_bytes)
            self._probe = agent.begin_read(attached.peer, [span]), attached
        except Exception as failed:  # noqa: BLE001 (blocks are read in messages; it is tried again later)
            self._not_attached(failed)

    def _poll_probe(self) -> None:
        """On the thread: the memory is attached once something of it was read. A network that does not lead to the
        node, or a peer that does not answer, holds up no block so."""
        if self._probe is None:
            return
        handle, attached = self._probe
        try:
            if not handle.ended():
                return
        except PoolError as error:
            self._probe = None
            if self._agent is not None:
                self._agent.remove_peer(attached.peer)
            self._not_attached(error)
            return
        self._probe = None
        with self._lock:
            self._attached, self._attaching = attached, False

    def _not_attached(self, error: Exception) -> None:
        note_loss("one_sided_not_attached", self._link.place, "%s: blocks are read in messages: %s",
                  self._link.place, error)  # fmt: skip
        with self._lock:
            self._why_not, self._attaching = str(error), False
            self._attach_after_s = time.monotonic() + OFF_S

    def _detach(self, why: str, at_once: bool) -> None:
        """Do not begin reads of the attached memory any more. The peer is removed with the next one, or at the end:
        reads may be under way. `at_once`: attach it again with the next read."""
        with self._lock:
            if self._attached is not None:
                self._attached.node_id = b"\0"
            self._why_not = why
            self._attach_after_s = time.monotonic() + (0.0 if at_once else OFF_S)

    def _register(self, buffer: memoryview) -> None:
        """Register memory with NIXL. Raises PoolError."""
        assert self._agent is not None
        if self._registered.find(address_of(buffer))[0] >= 0:
            return
        made = self._agent.register(buffer)
        with self._lock:
            self._registrations.append(made)
            self._registered.add(address_of(buffer), address_of(buffer) + len(buffer), len(self._registrations) - 1)

    def close(self, timeout_s: float) -> None:
        """End reads that wait; those that NIXL has begun end when it ends them. To be called after the link is closed.
        Memory into which NIXL still reads then stays registered."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = list(self._waiting), deque()
            self._changed.notify()
        for one in waiting:
            self._end(one, PoolError("closed", "the pool is closed"))
        thread, verifying, agent = self._thread, self._verifying, self._agent
        if thread is None or verifying is None:
            return
        deadline_s = time.monotonic() + timeout_s
        thread.join(timeout_s)
        verifying.close(max(0.1, deadline_s - time.monotonic()))
        if agent is None or thread.alive or self._probe is not None:
            return
        with self._lock:
            attached, self._attached = self._attached, None
            registrations, self._registrations = self._registrations, []
        if attached is not None:
            agent.remove_peer(attached.peer)
        for made in registrations:
            agent.deregister(made)


def _address(memory: NodeMemory, lent: wire.LentBlock, size_bytes: int) -> int | None:
    """The node's address of a block; None where it does not lie in the region."""
    if lent.region >= len(memory.regions):
        return None
    region = memory.regions[lent.region]
    return region.address + lent.offset if lent.offset + size_bytes <= region.size_bytes else None
