"""A pool node's side of one-sided reads: its memory is registered, and blocks in it are lent to clients.

A lent block stays where it is until its lease ends: when the client gives it back, at its deadline, or with the
client's connection. Blocks of memory members are lent in place; those of SSDs and of other nodes are loaded into
staging memory of this module first. How much a client may have lent is bounded (`core.pool.leases`); what is refused,
the client reads in messages.

The lease only saves waste. The client verifies every block by its checksum, which the key seeds: memory that was used
again meanwhile is a failed read, as is a restarted node. With plain verbs clients can write nothing but the space for
their writes (`pool.net.pool_grants`). NIXL's registrations allow writes of all of this memory, by a client that knows
the metadata: therefore that is for clients that are trusted with the pool's content (docs: secure connections). Honest
ones write only what they were granted.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Protocol

import msgspec
from msgspec import Meta

from penstock.core.layout import staging_bytes
from penstock.core.pool.leases import LeaseTable
from penstock.framing import decode
from penstock.io.memory import address_of, aligned_buffer
from penstock.io.numa import bind_memory
from penstock.io.regions import Regions
from penstock.pool.api import PoolError
from penstock.pool.local.extents import ExtentAllocator
from penstock.pool.losses import note_loss
from penstock.pool.net import wire
from penstock.pool.net.one_sided_agent import Access, OneSidedAgent
from penstock.pool.net.pool_grants import CAPACITY_BYTES_MAX as GRANT_BYTES_MAX
from penstock.pool.net.pool_grants import PoolGrants
from penstock.pool.node_backend import NodeBackend, OpenedBlock
from penstock.process.guarded_thread import GuardedThread

log = logging.getLogger(__name__)

REGION_BYTES_MAX = 2 << 30  # of one registration
STAGING_BYTES = 128 << 20  # where the node's staging memory has no configured size
LEASED_BYTES_OF_CLIENT = 256 << 20
LEASED_SHARE = 0.5  # of the memory members together, so that the rest can be evicted
LEASES_MAX = 1 << 16
ATTACHED_MAX = 2  # of one client: transfers may be under way when it attaches anew
REGISTER_PAUSE_S = 5.0  # between two looks for memory that is not registered
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of <linux/mman.h>; `mmap` does not name it
_libc = ctypes.CDLL(None, use_errno=True)


class Region(msgspec.Struct, array_like=True):
    """Registered memory of a node."""

    address: Annotated[int, Meta(ge=0, extra={"bits": 64})]
    size_bytes: Annotated[int, Meta(ge=1, le=REGION_BYTES_MAX)]


class NodeMemory(msgspec.Struct, array_like=True):
    """What `Attached` of a pool node describes: the metadata of its agent, its regions, and their `epoch`, which
    changes with them; `grant_bytes`: the space for writes that one client is granted at the same time (0: none);
    `accepted`: what the agent says to this client alone."""

    metadata: wire.Description
    regions: Annotated[list[Region], Meta(max_length=wire.REGIONS_MAX)]
    epoch: wire.Count
    grant_bytes: wire.Count = 0
    accepted: wire.Description = b""


_descriptions = msgspec.msgpack.Decoder(NodeMemory)


def decode_node_memory(description: bytes) -> NodeMemory:
    """The memory that a node described. Raises ProtocolError."""
    return decode(_descriptions, description, "a description of memory")


class Borrower(Protocol):
    """A client's connection."""

    def answer(self, reply: wire.LentMany) -> None:
        """Send this answer, from any thread; never waits."""

    def answer_now(self, reply: wire.LentMany) -> None:
        """Send this answer at once, on the thread that asks. Raises OSError."""


class _Attachments:
    """What ends the transfers of one client, for each time that it attached."""

    def __init__(self) -> None:
        self.ends: deque[Callable[[], bool]] = deque()
        self._lasting = False  # transfers of an earlier attachment could not be ended

    def end(self, ends: Sequence[Callable[[], bool]]) -> bool:
        """Call these; whether the transfers of all that were called so far have ended. Not under a lock."""
        self._lasting |= not all([end() for end in ends])
        return not self._lasting


class PoolLending:
    """The registered memory of a node, and the leases on it. Any thread may call."""

    def __init__(self, pool: NodeBackend, agent: OneSidedAgent, staging_capacity_bytes: int | None) -> None:
        """Registers the memory of `pool` now. Where that is refused, `off` says why, and nothing is lent."""
        self._pool, self._agent = pool, agent
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._registering = threading.Lock()
        self._registrations: dict[int, tuple[memoryview, list[Any]]] = {}  # address of memory -> memory, handles
        self._regions: list[Region] = []
        self._places = Regions()
        self._metadata = b""
        self._epoch = time.time_ns() >> 10  # differs from that of an earlier start of this node
        self._looked_s = float("-inf")
        self._held: dict[int, Callable[[], None]] = {}  # lease -> what frees its memory
        self._attached: dict[Borrower, _Attachments] = {}
        self._wakes_s = float("inf")  # when the thread wakes that ends leases; mostly their blocks are returned before
        self._closed = False
        self.off: str | None = None
        self.lent_bytes = self.lent_blocks = 0
        self._staging = memoryview(b"")
        self._grantable = memoryview(b"")
        try:
            capacity_bytes = staging_bytes(staging_capacity_bytes or STAGING_BYTES)
            self._staging = aligned_buffer(capacity_bytes)
            self._grantable = aligned_buffer(staging_bytes(min(capacity_bytes // 2, GRANT_BYTES_MAX)))
            self._free = ExtentAllocator(0, len(self._staging))
            for memory in (self._staging, self._grantable):
                if agent.numa_node is not None and (refused := bind_memory(memory, agent.numa_node, strict=False)):
                    log.info("staging memory is not on the NUMA node of the RDMA devices: %s", refused)
                pool.register(memory)
            self._register()
        except (OSError, MemoryError, PoolError) as error:
            self._turn_off(f"{error}; allowed: a higher limit of locked memory (ulimit -l, LimitMEMLOCK)")
        members_bytes = sum(map(len, pool.host_buffers()))
        at_most = int(LEASED_SHARE * members_bytes) or len(self._staging)
        self._leases = LeaseTable(LEASED_BYTES_OF_CLIENT, at_most, LEASES_MAX)
        self.grants = PoolGrants(self._grantable, self._locate) if self.off is None else None
        self._thread = GuardedThread("penstock-leases", self._watch, restarts=True)
        self._thread.start()

    @property
    def kind(self) -> str:
        """The transport's name in greetings; empty when nothing is lent."""
        return "" if self.off is not None else self._agent.kind

    @property
    def state(self) -> str:
        """How clients read, or why they do not read one-sided."""
        return f"off: {self.off}" if self.off is not None else self._agent.transport

    @property
    def registered_bytes(self) -> int:
        """Bytes of all regions."""
        return sum(region.size_bytes for region in self._regions)

    @property
    def leased_bytes(self) -> int:
        """Bytes under lease."""
        with self._lock:
            return self._leases.held_bytes

    def _turn_off(self, why: str) -> None:
        self.off = why
        self._deregister()
        log.warning("blocks are not read one-sided: %s", why)

    # --- registered memory ---

    def _register(self) -> None:
        """Register memory of the pool that is new, deregister what has left it. Raises PoolError."""
        with self._registering:
            wanted = {address_of(memory): (memory, access) for memory, access in self._memory()}
            gone = [address for address in self._registrations if address not in wanted]
            new = [address for address in wanted if address not in self._registrations]
            for address in gone:
                for handle in self._registrations.pop(address)[1]:
                    self._agent.deregister(handle)
            for address in new:
                (memory, access), handles = wanted[address], []
                try:
                    for at in range(0, len(memory), REGION_BYTES_MAX):
                        part = memory[at : at + REGION_BYTES_MAX]
                        _populate(part)
                        handles.append(self._agent.register(part, access))
                except PoolError:
                    for handle in handles:
                        self._agent.deregister(handle)
                    raise
                self._registrations[address] = memory, handles
            if gone or new:
                self._describe()

    def _memory(self) -> list[tuple[memoryview, Access]]:
        readable = *self._pool.host_buffers(), self._staging
        return [*((memory, "read") for memory in readable), (self._grantable, "write")]

    def _locate(self, address: int, size_bytes: int) -> tuple[int, int, int] | None:
        """Epoch, region and offset of registered memory; None where it is not all in one region."""
        with self._lock:
            region, room_bytes = self._places.find(address)
            if region < 0 or room_bytes < size_bytes:
                return None
            return self._epoch, region, address - self._regions[region].address

    def _describe(self) -> None:
        """Make the regions anew from the registrations."""
        regions: list[Region] = []
        places = Regions()
        for address, (memory, _) in self._registrations.items():
            for at in range(0, len(memory), REGION_BYTES_MAX):
                size_bytes = min(REGION_BYTES_MAX, len(memory) - at)
                places.add(address + at, address + at + size_bytes, len(regions))
                regions.append(Region(address + at, size_bytes))
        if len(regions) > wire.REGIONS_MAX:
            raise PoolError("full", f"{len(regions)} regions of memory; allowed: {wire.REGIONS_MAX}")
        metadata = self._agent.metadata()
        with self._lock:
            self._regions, self._places, self._metadata = regions, places, metadata
            self._epoch += 1

    def _look_again(self) -> None:
        """Register memory of members that were added since; at most every REGISTER_PAUSE_S."""
        with self._lock:
            if time.monotonic() < self._looked_s + REGISTER_PAUSE_S:
                return
            self._looked_s = time.monotonic()
        try:
            self._register()
        except PoolError as error:
            note_loss("not_registered", "", "memory of a new member is not read one-sided: %s", error)

    def _deregister(self) -> None:
        with self._registering:
            registered, self._registrations = list(self._registrations.values()), {}
        for _, handles in registered:
            for handle in handles:
                self._agent.deregister(handle)

    def attach(self, client: Borrower, request: bytes) -> bytes:
        """What a client that asks with `request` needs to read, as bytes (`NodeMemory`). Raises PoolError."""
        if self.off is not None:
            raise PoolError("layout", self.off)
        accepted, end = self._agent.accept(request)
        replaced: list[Callable[[], bool]] = []
        with self._lock:
            of_client = self._attached.setdefault(client, _Attachments())
            of_client.ends.append(end)
            if len(of_client.ends) > ATTACHED_MAX:
                replaced.append(of_client.ends.popleft())
            grant_bytes = self.grants.bytes_of_client_max if self.grants is not None else 0
            memory = NodeMemory(self._metadata, self._regions, self._epoch, grant_bytes, accepted)
            described = msgspec.msgpack.encode(memory)
        of_client.end(replaced)
        if len(described) > wire.DESCRIPTION_BYTES_MAX:
            raise PoolError("full", f"the memory's description has {len(described)} bytes")
        return described

    # --- leases ---

    def lend(
        self,
        client: Borrower,
        pool: NodeBackend,
        request: wire.LendMany,
        note_reads: Callable[[bytes, Sequence[int]], list[int]],
    ) -> bool:
        """Lend blocks of `pool`: answered by `client.answer_now` for those in memory, and by `client.answer` later for
        those that are loaded first. Returns whether any may be lent. `note_reads` gets the keys, and which
        of them are here; it returns the hot ones (`PoolNode.note_reads`). Raises OSError."""
        if request.returned:
            self.returned(client, request.returned)
        keys = wire.split_keys(request.keys)
        answer = _Answer(client, request.id, len(keys))
        until_s = time.monotonic() + min(request.timeout_s, wire.LEASE_S_MAX)
        now: list[wire.LentBlock] = []
        loads: list[Callable[[], None]] = []
        here: list[int] = []
        for index, (key, size_bytes) in enumerate(zip(keys, request.sizes, strict=True)):
            opened = pool.open_block(key, size_bytes)
            if isinstance(opened, PoolError):
                now.append(wire.LentBlock(index, reason=opened.reason))
                continue
            here.append(index)
            if opened.view is not None:
                now.append(self._lend_in_place(client, index, opened, opened.view, until_s))
            else:
                staged = self._stage(client, index, opened, size_bytes, until_s, answer)
                if isinstance(staged, wire.LentBlock):
                    now.append(staged)
                else:
                    loads.append(staged)
        answer.hot = note_reads(request.keys, here)
        try:
            if now:
                client.answer_now(answer.of(now, self._epoch))
        finally:
            for load in loads:  # after the answer, as the last one must be sent last
                load()
        return bool(loads) or any(block.lease for block in now)

    def _lend_in_place(
        self, client: Borrower, index: int, opened: OpenedBlock, view: memoryview, until_s: float
    ) -> wire.LentBlock:
        lent = self._grant(client, index, opened, view, until_s, opened.release)
        if lent.lease:
            opened.note_read()
        return lent

    def _grant(
        self,
        client: Borrower,
        index: int,
        opened: OpenedBlock,
        view: memoryview,
        until_s: float,
        free: Callable[[], None],
    ) -> wire.LentBlock:
        """Lease the block that lies in `view`; `free` is called when the lease ends, or now where it is refused."""
        address, size_bytes = address_of(view), len(view)
        lease = None
        with self._lock:
            slot, room_bytes = self._places.find(address)
            if slot >= 0 and room_bytes >= size_bytes and not self._closed:
                lease = self._leases.grant(client, size_bytes, until_s)
            if lease is not None:
                self._held[lease] = free
                self.lent_bytes += size_bytes
                self.lent_blocks += 1
                offset = address - self._regions[slot].address
                if until_s < self._wakes_s:
                    self._wakes_s = until_s
                    self._changed.notify()
        if lease is not None:
            return wire.LentBlock(index, lease, slot, offset, opened.checksum, opened.mac)
        free()
        if slot < 0:
            self._look_again()
        return wire.LentBlock(index, reason="layout" if slot < 0 or room_bytes < size_bytes else "dropped")

    def _stage(
        self, client: Borrower, index: int, opened: OpenedBlock, size_bytes: int, until_s: float, answer: _Answer
    ) -> wire.LentBlock | Callable[[], None]:
        """A load of the block into registered staging memory, or the refusal where that is full."""
        length = staging_bytes(size_bytes)
        with self._lock:
            at = None
            if not self._closed and length <= len(self._staging):
                at = self._free.take(length)
        if at is None:
            opened.release()
            return wire.LentBlock(index, reason="dropped")
        slot = self._staging[at : at + length]

        def free() -> None:
            with self._lock:
                self._free.give(at, length)

        def loaded(error: PoolError | None) -> None:
            if error is not None:
                free()
                block = wire.LentBlock(index, reason=error.reason)
            else:
                block = self._grant(client, index, opened, slot[:size_bytes], until_s, free)
            opened.release()
            answer.add(block, self._epoch)

        def load() -> None:
            try:
                opened.load(slot, until_s - time.monotonic(), loaded)
            except Exception as error:  # noqa: BLE001 (of one block; the client's connection goes on)
                loaded(PoolError("device", f"the node failed: {error!r}"))

        return load

    def returned(self, client: Borrower, leases: Sequence[int]) -> None:
        """A client has read these blocks, or writes no more to these grants."""
        if self.grants is not None:
            self.grants.returned(client, leases)
        with self._lock:
            ended = [self._held.pop(lease) for lease in self._leases.give_back(client, leases)]
        for free in ended:
            free()

    def gone(self, client: Borrower) -> None:
        """A client's connection has ended: its leases and grants end."""
        with self._lock:
            attached = self._attached.pop(client, None)
        writes_ended = attached is not None and attached.end(attached.ends)
        if self.grants is not None:
            self.grants.gone(client, writes_ended)
        with self._lock:
            ended = [self._held.pop(lease) for lease in self._leases.leave(client)]
        for free in ended:
            free()

    def _watch(self) -> None:
        """End leases that run out."""
        while True:
            with self._lock:
                if self._closed:
                    return
                ended = [self._held.pop(lease) for lease in self._leases.run_out(time.monotonic())]
                if not ended:
                    next_s = self._leases.next_s
                    self._wakes_s = float("inf") if next_s is None else next_s
                    self._changed.wait(None if next_s is None else max(0.0, next_s - time.monotonic()))
                    continue
            note_loss("lent_blocks_taken_back", "", "%d lent blocks were not returned in time: taken back", len(ended))
            for free in ended:
                free()

    def check_integrity(self) -> None:
        """Assert that every lease holds memory, and only leases do; for tests."""
        with self._lock:
            self._leases.check_integrity()
            assert len(self._held) == len(self._leases)

    def close(self, timeout_s: float) -> None:
        """End all leases, and deregister the memory."""
        with self._lock:
            self._closed = True
            ended, self._held = list(self._held.values()), {}
            attached, self._attached = list(self._attached.values()), {}
            self._changed.notify_all()
        for one in attached:
            one.end(one.ends)
        for free in ended:
            free()
        if self.grants is not None:
            self.grants.close(timeout_s)
        self._thread.join(timeout_s)
        self._deregister()


class _Answer:
    """The answers to one LendMany: the first one says which blocks are `hot`, the last one completes it."""

    def __init__(self, client: Borrower, id: int, blocks: int) -> None:
        self._client, self._id = client, id
        self._lock = threading.Lock()
        self._left = blocks
        self.hot: list[int] = []

    def of(self, blocks: list[wire.LentBlock], epoch: int) -> wire.LentMany:
        """The answer for these blocks, which is to be sent before any other one is made."""
        self._left -= len(blocks)
        hot, self.hot = self.hot, []
        return wire.LentMany(self._id, epoch, blocks, self._left > 0, hot)

    def add(self, block: wire.LentBlock, epoch: int) -> None:
        """Send what became of a block that was loaded."""
        with self._lock:
            self._client.answer(self.of([block], epoch))


def _populate(memory: memoryview) -> None:
    """Give the memory its pages now: registration would otherwise find them one by one, and small."""
    end = address_of(memory) + len(memory)
    start = -(-address_of(memory) // mmap.PAGESIZE) * mmap.PAGESIZE
    if end > start:
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _POPULATE_WRITE)
