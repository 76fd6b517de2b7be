"""The decode buffer: host memory that collects the KV of prompts before their decode begins.

Each hand-off reserves room for its whole prompt before a byte of it moves, first come first served, so a hand-off that
has begun can always end, however full the buffer is. A block arrives when the prefill engine writes it, or when it is
loaded from the storage pool (a prefill engine reads through this host); it stays for the decode engine. Blocks that no
hand-off needs any more are a cache, evicted least recently used first.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from penstock.core.keys import BlockKey
from penstock.core.layout import staging_bytes
from penstock.io.memory import aligned_buffer
from penstock.pool.api import Done, Pool, PoolError
from penstock.pool.callbacks import call_done
from penstock.pool.local.pinned_block import PinnedBlock
from penstock.pool.mac import PoolKey, check_block
from penstock.process.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

Stored = tuple[int, bytes]  # (checksum, MAC) that arrived with a block


class Arrival(Enum):
    """RESERVED: there is room for the block. ARRIVING: it is being written or loaded. READY: it is present."""

    RESERVED = "reserved"
    ARRIVING = "arriving"
    READY = "ready"


@dataclass(slots=True, eq=False)
class _Slot:
    """One block. `wanted_by`: hand-offs that need it; `users`: readers that read it in place now."""

    key: BlockKey
    number: int
    state: Arrival = Arrival.RESERVED
    checksum: int = 0
    mac: bytes = b""
    wanted_by: int = 0
    users: int = 0
    loading: bool = False
    waiting: list[Done] = field(default_factory=list)  # called when it has arrived or failed
    written_here: ClassVar[bool] = True  # or verified on arrival


HeldBlock = PinnedBlock[_Slot, memoryview]


@dataclass(slots=True)
class _HandOff:
    keys: dict[BlockKey, None]  # in the order of the prompt
    granted: Callable[[], None]
    needs: int = 0  # slots that its grant would take, while it is the first that waits


class DecodeBuffer:
    """`blocks` slots of one full block each, over the storage pool that decode reads come from. Any thread may call;
    callbacks run on the caller's thread or the pool's, and must not block."""

    def __init__(
        self,
        block_bytes: int,
        blocks: int,
        storage: Pool,
        allocate: Callable[[int], memoryview] = aligned_buffer,
        pool_key: PoolKey | None = None,
    ) -> None:
        """With a `pool_key` every block, from `storage` or from a writer (`check`), needs a valid MAC."""
        if blocks < 1:
            raise ValueError(f"a decode buffer of {blocks} blocks; at least 1 is allowed")
        self.block_bytes = block_bytes
        self.blocks = blocks
        self._slot_bytes = staging_bytes(block_bytes)
        self.memory = allocate(self._slot_bytes * blocks)
        self._storage = storage
        self._pool_key = pool_key
        storage.register(self.memory)
        self._lock = threading.Lock()
        self._free = list(range(blocks - 1, -1, -1))
        self._slots: dict[BlockKey, _Slot] = {}
        self._idle: OrderedDict[BlockKey, None] = OrderedDict()  # READY, not wanted, not used: may be evicted
        self._hand_offs: dict[str, _HandOff] = {}
        self._queue: OrderedDict[str, None] = OrderedDict()  # hand-offs that wait for room
        self._first: _HandOff | None = None  # of these, once its `needs` were counted
        self._loads = 0
        self.loaded_bytes = self.received_bytes = self.evictions = 0

    # --- room ---

    def reserve(self, name: str, keys: Sequence[BlockKey], granted: Callable[[], None]) -> None:
        """Call `granted` once there is room for these blocks, which then stay until `release`. Raises ValueError for a
        name that is in use, or more blocks than the buffer has."""
        wanted = dict.fromkeys(keys)
        if len(wanted) > self.blocks:
            raise ValueError(f"the prompt has {len(wanted)} blocks; the decode buffer has room for {self.blocks}")
        with self._lock:
            if name in self._hand_offs:
                raise ValueError(f"hand-off {name!r} is known already")
            self._hand_offs[name] = _HandOff(wanted, granted)
            self._queue[name] = None
        self._grant()

    def release(self, name: str) -> None:
        """Free the blocks of a hand-off, or withdraw its request for room; unknown ones are ignored."""
        with self._lock:
            hand_off = self._hand_offs.get(name)
            if hand_off is None:
                return
            if name in self._queue:
                self._leave_queue(name)
            else:
                for key in hand_off.keys:
                    slot = self._slots[key]
                    slot.wanted_by -= 1
                    self._settle(slot)
            del self._hand_offs[name]
        self._grant()

    def _grant(self) -> None:
        """Grant room to waiting hand-offs; to be called after room was freed. O(1) where the first one does not fit."""
        while True:
            with self._lock:
                name = next(iter(self._queue), None)
                if name is None or not self._fits(self._hand_offs[name]):
                    return
                hand_off = self._hand_offs[name]
                self._leave_queue(name)
                for key in sorted(hand_off.keys, key=lambda key: key not in self._slots):  # what is here first
                    self._take(key).wanted_by += 1
            try:
                hand_off.granted()
            except Exception as error:  # noqa: BLE001 (of one hand-off; the next ones must be granted too)
                rare.exception("granted", "the callback of a hand-off that got room failed: %r", error)

    def _leave_queue(self, name: str) -> None:
        del self._queue[name]
        if self._first is self._hand_offs.get(name):
            self._first = None

    def _fits(self, hand_off: _HandOff) -> bool:
        """Whether the first hand-off that waits can have its slots. Counted once, then kept up to date (`_in_use`)."""
        if self._first is not hand_off:
            self._first = hand_off
            hand_off.needs = sum(key not in self._slots or key in self._idle for key in hand_off.keys)
        return hand_off.needs <= len(self._free) + len(self._idle)

    def _in_use(self, key: BlockKey, begins: bool) -> None:
        """A slot came into use for the block, or went out of it: it is idle or free."""
        if self._first is not None and key in self._first.keys:
            self._first.needs += -1 if begins else 1

    def _take(self, key: BlockKey) -> _Slot:
        """The block's slot, removed from the slots that may be evicted."""
        slot = self._slots.get(key)
        if slot is None:
            if not self._free:
                self._drop(self._slots[next(iter(self._idle))])
                self.evictions += 1
            slot = self._slots[key] = _Slot(key, self._free.pop())
            self._in_use(key, begins=True)
        else:
            self._use_idle(key)
        return slot

    def _use_idle(self, key: BlockKey) -> None:
        if key in self._idle:
            del self._idle[key]
            self._in_use(key, begins=True)

    def _settle(self, slot: _Slot) -> bool:
        """Update a slot after a use of it ended. Returns whether it is free or may be evicted now, so that there is
        more room."""
        if slot.wanted_by or slot.users or slot.state is Arrival.ARRIVING:
            return False
        self._in_use(slot.key, begins=False)
        if slot.state is Arrival.READY:
            self._idle[slot.key] = None
        else:
            self._drop(slot)
        return True

    def _drop(self, slot: _Slot) -> None:
        self._idle.pop(slot.key, None)
        del self._slots[slot.key]
        self._free.append(slot.number)

    # --- blocks ---

    def has(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which blocks are present."""
        with self._lock:
            slots = [self._slots.get(key) for key in keys]
            return [slot is not None and slot.state is Arrival.READY for slot in slots]

    def view(self, slot_number: int) -> memoryview:
        """A slot's memory, padded to the alignment."""
        return self.memory[slot_number * self._slot_bytes : (slot_number + 1) * self._slot_bytes]

    def offset(self, held: HeldBlock) -> int:
        """Offset of a held block in `memory`."""
        return held.block.number * self._slot_bytes

    def hold(self, key: BlockKey) -> HeldBlock | None:
        """Pin a block that is present, until it is released; None when it is absent."""
        with self._lock:
            slot = self._slots.get(key)
            if slot is None or slot.state is not Arrival.READY:
                return None
            slot.users += 1
            self._use_idle(key)
            return PinnedBlock(slot, self.view(slot.number)[: self.block_bytes], self._unpin)

    def _unpin(self, slot: _Slot) -> None:
        """Unpin a slot; a slot without users may be used for another block."""
        with self._lock:
            slot.users -= 1
            room = self._settle(slot)
        if room:
            self._grant()

    def begin_write(self, key: BlockKey) -> memoryview | PoolError | None:
        """Memory into which to receive a block; `end_write` must follow. None when the block is present or arriving
        already. An error for a block that no hand-off expects."""
        with self._lock:
            slot = self._slots.get(key)
            if slot is None or not slot.wanted_by:
                return PoolError("missing", f"no hand-off expects block {key.hex()}")
            if slot.state is not Arrival.RESERVED:
                return None
            slot.state = Arrival.ARRIVING
            return self.view(slot.number)

    def check(self, key: BlockKey, data: memoryview, checksum: int, mac: bytes) -> PoolError | None:
        """The error in received bytes, or None; to be called by a writer before `end_write`."""
        return check_block(self._pool_key, key, data, checksum, mac)

    def end_write(self, key: BlockKey, stored: Stored | None, error: PoolError | None = None) -> None:
        """End a write: the block passed `check` with `stored`; None: it did not arrive, because of `error`."""
        if stored is not None:
            self.received_bytes += self.block_bytes
        self._arrived(key, stored, error)

    def load(self, key: BlockKey, timeout_s: float, done: Done) -> None:
        """Call `done` when the block is present: at once, when it has arrived, or after loading it from storage."""
        error: PoolError | None = None
        with self._lock:
            slot = self._slots.get(key)
            if slot is None or (not slot.wanted_by and slot.state is not Arrival.READY):
                error = PoolError("missing", f"no hand-off expects block {key.hex()}")
            elif slot.state is not Arrival.READY:
                slot.waiting.append(done)
                if slot.state is Arrival.ARRIVING:
                    return
                slot.state, slot.loading = Arrival.ARRIVING, True
                self._loads += 1
        if error is not None or slot is None or slot.state is Arrival.READY:
            call_done(done, error)
            return
        into = self.view(slot.number)
        found: list[Stored] = []  # checksum and MAC, once verified

        def check(data: memoryview, checksum: int, mac: bytes) -> PoolError | None:
            failed = self.check(key, data, checksum, mac)
            if failed is None:
                found.append((checksum, mac))
            return failed

        def loaded(failed: PoolError | None) -> None:
            if failed is None and not found:
                failed = PoolError("checksum", f"block {key.hex()} came by a path that did not verify it")
            if failed is None:
                self.loaded_bytes += self.block_bytes
            self._arrived(key, found[0] if failed is None else None, failed)

        try:
            self._storage.read(key, self.block_bytes, into, timeout_s, loaded, check)
        except Exception as failed:  # noqa: BLE001 (otherwise the slot would stay in ARRIVING for ever)
            rare.exception("load", "block %s could not be requested: %r", key.hex(), failed)
            self._arrived(key, None, PoolError("network", repr(failed)))

    def _arrived(self, key: BlockKey, stored: Stored | None, error: PoolError | None) -> None:
        with self._lock:
            slot = self._slots[key]
            assert slot.state is Arrival.ARRIVING
            waiting, slot.waiting = slot.waiting, []
            self._loads -= slot.loading
            slot.loading = False
            if stored is not None:
                slot.state, (slot.checksum, slot.mac) = Arrival.READY, stored
            else:
                slot.state = Arrival.RESERVED
                error = error or PoolError("network", f"block {key.hex()} did not arrive")
            room = self._settle(slot)
        for done in waiting:
            call_done(done, error)
        if room:
            self._grant()

    # --- views ---

    @property
    def free_blocks(self) -> int:
        """Blocks that a hand-off could take now."""
        with self._lock:
            return len(self._free) + len(self._idle)

    @property
    def used_blocks(self) -> int:
        """Slots in use."""
        with self._lock:
            return self.blocks - len(self._free)

    @property
    def loading_bytes(self) -> int:
        """Bytes being loaded from storage."""
        return self._loads * self.block_bytes

    def check_integrity(self) -> None:
        """Assert the invariants, for tests: every slot is free or belongs to one block; `wanted_by` is the number of
        hand-offs with the block; a slot that nobody needs may be evicted."""
        with self._lock:
            numbers = [slot.number for slot in self._slots.values()]
            assert sorted([*numbers, *self._free]) == list(range(self.blocks)), "a slot is lost or has two owners"
            granted = [h for name, h in self._hand_offs.items() if name not in self._queue]
            for key, slot in self._slots.items():
                assert slot.key == key and slot.users >= 0
                assert slot.wanted_by == sum(key in hand_off.keys for hand_off in granted), "`wanted_by` is wrong"
                idle = slot.state is Arrival.READY and not slot.wanted_by and not slot.users
                assert (key in self._idle) == idle
                assert slot.wanted_by or slot.users or idle or slot.state is Arrival.ARRIVING, "a slot leaked"
                assert not slot.waiting or slot.state is Arrival.ARRIVING
            assert self._loads == sum(slot.loading for slot in self._slots.values())
            if self._queue and self._first is self._hand_offs[next(iter(self._queue))]:
                needed = [key for key in self._first.keys if key not in self._slots or key in self._idle]
                assert self._first.needs == len(needed), "what the first hand-off needs is miscounted"
