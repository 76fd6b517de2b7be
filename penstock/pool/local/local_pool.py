"""The embedded pool: members in this process behind the one interface of `pool.api`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from penstock.core.bandwidth import MemberBandwidth
from penstock.core.keys import BlockKey
from penstock.core.layout import staging_bytes
from penstock.core.new_block import NewBlock
from penstock.core.pool.copies import is_copy, original_of
from penstock.core.pool.policy import PoolPolicy
from penstock.core.pool.quota import TenantQuotas
from penstock.pool.api import Done, DoneMany, Located, MemberStat, PoolError, PoolStat, ReadCheck
from penstock.pool.block import Block
from penstock.pool.callbacks import call_done, call_soon, callback_worker
from penstock.pool.device_twin import DeviceTwin
from penstock.pool.local.drain import Drain
from penstock.pool.local.pinned_block import OpenBlock, PinnedBlock
from penstock.pool.local.row_batches import Found
from penstock.pool.local.suspects import Suspects
from penstock.pool.local.table import Table
from penstock.pool.local.writes import Writes
from penstock.pool.losses import losses, note_error, note_loss
from penstock.pool.mac import check_of
from penstock.pool.members.member import GoneMember, Member, fenced_reason, forget_rows, is_durable, observed, queued
from penstock.pool.members.memory import MemoryMember
from penstock.pool.members.stored_rows import Use, keys_of
from penstock.pool.members.work import Work
from penstock.pool.node_backend import BlockOrigin, OpenedBlock
from penstock.pool.spans import read_each
from penstock.process.guarded_thread import thread_failures
from penstock.units import format_bytes

log = logging.getLogger(__name__)

OBSERVE_EVERY_S = 1.0
EVICTED_AT_ONCE = 64  # the same for keys to be evicted, and for uses that a durable table takes
LOCATED_MAX = 4096
KEYS_AT_ONCE = 1024  # keys handled before the lock is released once for other threads: less than 1 ms


class LocalPool:
    """Members in this process. Contract: `pool.api.Pool`.

    One difference: a transfer that a device has begun cannot be stopped; such a read or write is reported when the
    device answers, at the latest by `close`. A device that does not answer for 10 s is fenced.
    """

    def __init__(self, members: Sequence[Member], weights: Sequence[float], policy: PoolPolicy | None = None) -> None:
        """Owns the members from now on. `weights` are their shares of new blocks (any scale, such as bytes per
        second)."""
        if not members or len(members) != len(weights):
            raise ValueError(f"{len(members)} members and {len(weights)} weights; at least one, and as many of each")
        policy = policy or PoolPolicy()
        self.members = list(members)
        self.notes = [note for member in members for note in member.notes]
        self._lock = threading.Lock()
        ranges = [(member.start_offset, member.capacity_bytes) for member in members]
        quotas = TenantQuotas(policy.quota_bytes, policy.default_quota_bytes, copies_share=policy.copies_share)
        self._table = Table(ranges, weights, quotas)
        self._follow_bandwidth = policy.follow_bandwidth
        self._bandwidths = [_bandwidth(weight) for weight in weights]
        self._next_observation_s = 0.0
        self._registered: list[memoryview] = []
        self._drains: dict[int, Drain] = {}
        self._closed = False
        self._evictions = self._checksum_errors = self._moved_blocks = 0
        self._suspects = Suspects(self)
        self._located: dict[tuple[int, str], Located] = {}  # answers of lookups, each made once
        self._callbacks = callback_worker()
        self._writes = Writes(
            self._lock, self._table, self.members, self._suspects, self._callbacks, policy, self._unready
        )
        for number, member in enumerate(self.members):
            self._restore(number, member)
            self._follow(number, member)
        for member in self.members:
            member.start()

    # --- the interface ---

    def register(self, buffer: memoryview, twin: DeviceTwin | None = None) -> None:
        """Announce staging memory to every member, also to those that are added later. Nothing lands in its twin."""
        with self._lock:
            self._registered.append(buffer)
            members = list(self.members)
        for member in members:
            member.register(buffer)

    def lookup(self, keys: Sequence[BlockKey], timeout_s: float) -> list[Located | None]:
        """Where each block lies, None for a miss; the use of a block found is recorded with its row. Many keys are
        looked up in parts, so a block may be added or removed in between, as it may before the caller uses the answer.
        Raises PoolError once closed."""
        located: list[Located | None] = []
        for some in _in_turns(keys):
            places = self.locate(b"".join(some), timeout_s)
            located += [places] * len(some) if isinstance(places, Located) else places
        return located

    def locate(self, keys: bytes, timeout_s: float) -> Located | list[Located | None]:
        """As `lookup`, of at most KEYS_AT_ONCE keys that are concatenated; a single place where all blocks lie
        alike."""
        found, names = self._look_up(keys)
        self._writes.note_lookup(keys, found)
        if keys and found.alike:
            return self._located_at(int(found.sizes[0]), names[found.members[0]])
        places = list(zip(found.sizes.tolist(), found.members.tolist(), strict=True))
        known = {(size, at): self._located_at(size, names[at]) if size else None for size, at in set(places)}
        return [known[place] for place in places]

    def _look_up(self, keys: bytes) -> tuple[Found, list[str]]:
        """Where these blocks lie, and the names of the members; records the uses. Takes the lock."""
        with self._lock:
            self._check_open()
            self._check_members()
            return self._table.lookup_many(keys), [member.name for member in self.members]

    def _located_at(self, size_bytes: int, name: str) -> Located:
        located = self._located.get((size_bytes, name))
        if located is None:
            if len(self._located) >= LOCATED_MAX:
                self._located.clear()
            located = self._located[size_bytes, name] = Located(size_bytes, (name,))
        return located

    def read(
        self,
        key: BlockKey,
        size_bytes: int,
        into: memoryview,
        timeout_s: float,
        done: Done,
        check: ReadCheck | None = None,
    ) -> None:
        """Copy a block into `into`; `check` is called with its bytes, checksum and MAC before `done`."""
        opened = self.open_block(key, size_bytes)
        if isinstance(opened, PoolError):
            call_soon(self._callbacks, done, opened)
            return

        def finished(error: PoolError | None) -> None:
            if error is None and (opened.view is None or check is not None):
                error = self.verify(opened.block, into, check)
            opened.release()
            call_done(done, error)

        self.load(opened, into, timeout_s, finished)

    def read_many(
        self,
        keys: Sequence[BlockKey],
        size_bytes: int,
        intos: Sequence[memoryview],
        timeout_s: float,
        done: DoneMany,
        checks: Sequence[ReadCheck | None] | None = None,
    ) -> None:
        """As `read` of each block."""
        read_each(self, keys, size_bytes, intos, timeout_s, done, checks)

    def lease(self, key: BlockKey) -> PinnedBlock[Block, memoryview] | None:
        """Pin a block of a memory member to be read in place. None for a miss, and for a block on a device."""
        opened = self.open_block(key, None)
        if isinstance(opened, PoolError):
            return None
        if opened.view is None:
            opened.release()
            return None
        self.note_read(opened)
        return PinnedBlock(opened.block, opened.view, self.unpin)

    def host_buffers(self) -> list[memoryview]:
        """The mappings of the memory members, for a device that reads from them directly."""
        return [member.memory for member in self.members if isinstance(member, MemoryMember)]

    def write(self, block: NewBlock, data: memoryview, timeout_s: float, done: Done) -> None:
        """Copy a block in; `done` gets None when it can be read back, durably on a device member."""
        self._writes.begin([block], [data], timeout_s, lambda errors: done(errors[0]))

    def write_many(
        self, blocks: Sequence[NewBlock], datas: Sequence[memoryview], timeout_s: float, done: DoneMany
    ) -> None:
        """As `write` of each block, with one call of `done`. They become present together, once all are stored."""
        self._writes.begin(blocks, datas, timeout_s, done)

    def evict(self, keys: Sequence[BlockKey]) -> int:
        """Drop those of the blocks that are not pinned; returns how many were dropped."""
        evicted = 0
        for some in _in_turns(keys, EVICTED_AT_ONCE):
            with self._lock:
                gone = self._table.evict_many(b"".join(some))
                self._evictions += len(gone)
                forget_rows(self.members, gone)
            evicted += len(gone)
        return evicted

    def watch(self, on_gone: Callable[[BlockKey], None]) -> None:
        """Call `on_gone` for every block that leaves, from now on: under the pool's lock, so it must not block."""
        with self._lock:
            self._table.on_gone = on_gone

    def kind_of(self, key: BlockKey) -> str | None:
        """The kind of the member that has this block; None for a miss. No use is noted."""
        with self._lock:
            member = self._table.member_of(key)
            return None if member is None else self.members[member].kind

    def stat(self, timeout_s: float) -> PoolStat:
        """State of the pool, its members and tenants. Answered at once, so `timeout_s` is not used."""
        with self._lock:
            if not self._closed:
                self._check_members()
            present = [i for i, state in enumerate(self._table.members) if not state.gone]
            accounts = sorted(self._table.quotas, key=lambda account: -account[1])
            copies = tuple((original_of(account).hex(), held) for account, held in accounts if is_copy(account))
            return PoolStat(
                members=tuple(self._member_stat(number) for number in present),
                writes_dropped=self._writes.dropped,
                evictions=self._evictions + sum(self._table.evictions.values()),
                checksum_errors=self._checksum_errors,
                writes_not_admitted=self._writes.not_admitted,
                moved_blocks=self._moved_blocks + sum(drain.moved for drain in self._drains.values()),
                tenants=tuple((account.hex(), held) for account, held in accounts if not is_copy(account)),
                over_quota=tuple((payer.hex(), excess) for payer, excess in self._table.quotas.over_quota()),
                evictions_by=(("asked", self._evictions), *self._table.evictions.items()),
                writes_refused=self._writes.refused,
                losses=tuple(sorted(losses().items())),
                thread_failures=tuple(sorted(thread_failures().items())),
                copies=copies,
            )

    def close(self, timeout_s: float) -> None:
        """End drains and operations, commit the journals and close the members, within about `timeout_s`. A second call
        does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            drains = list(self._drains.values())
        deadline_s = time.monotonic() + timeout_s
        for drain in drains:
            drain.stop()
        for member in self.members:
            member.close(max(0.1, deadline_s - time.monotonic()))
        for drain in drains:
            drain.join(max(0.1, deadline_s - time.monotonic()))
        self._callbacks.close(max(0.1, deadline_s - time.monotonic()))

    # --- members that come and go ---

    def add_member(self, member: Member, weight_bytes_per_s: float) -> None:
        """Add a member, with the blocks it holds, while the pool runs; the pool owns it. Its weight has the others'
        scale.
        Raises ValueError for a name that is taken, PoolError when the pool is closed."""
        with self._lock:
            self._check_open()
            if any(other.name == member.name and not isinstance(other, GoneMember) for other in self.members):
                raise ValueError(f"the pool has a member {member.name} already; name another")
            table = self._table
            number = table.add_member(member.start_offset, member.capacity_bytes, weight_bytes_per_s)
            if number == len(self.members):
                self.members.append(member)
                self._bandwidths.append(_bandwidth(weight_bytes_per_s))
            else:
                self.members[number] = member
                self._bandwidths[number] = _bandwidth(weight_bytes_per_s)
            self._restore(number, member)
            self._follow(number, member)
            member.start()
            for buffer in self._registered:
                member.register(buffer)

    def drain_member(self, name: str) -> None:
        """Begin to empty a member: no block is placed there any more, its blocks move to the free space of the others
        (the most valuable first), the rest is dropped, then it is closed and removed. Returns at once; `stat` shows the
        progress. Raises ValueError for an unknown member, one that is being drained already, or the last one that
        accepts blocks."""
        with self._lock:
            self._check_open()
            states = self._table.members
            known = {member.name: n for n, member in enumerate(self.members) if not states[n].gone}
            number = known.get(name)
            if number is None:
                raise ValueError(f"the pool has no member {name!r}; it has {', '.join(known)}")
            if states[number].draining:
                raise ValueError(f"member {name} is being drained already")
            if not any(n != number and not states[n].draining for n in known.values()):
                raise ValueError(f"member {name} is the last one that takes blocks; add another one first")
            self._table.start_drain(number)
            self._drains[number] = Drain(self, self._table, self._lock, number, self._drain_ended)
            self._drains[number].start()

    def set_weight(self, name: str, weight: float) -> None:
        """Give a member another share of new blocks. Raises ValueError for an unknown member or a weight below 0."""
        with self._lock:
            states = self._table.members
            known = {member.name: n for n, member in enumerate(self.members) if not states[n].gone}
            if name not in known or states[known[name]].draining:
                raise ValueError(f"the pool has no member {name!r} that takes blocks; it has {', '.join(known)}")
            self._table.placement.set_weight(known[name], weight)
            self._bandwidths[known[name]] = _bandwidth(weight)

    def set_policy(self, policy: PoolPolicy) -> None:
        """Set quotas, write admission and bandwidth following. Raises ValueError for a value that is not allowed."""
        with self._lock:
            self._table.quotas.set_quotas(policy.quota_bytes, policy.default_quota_bytes, policy.copies_share)
            self._writes.set_policy(policy)
            self._follow_bandwidth = policy.follow_bandwidth

    # --- for a pool node (`pool.node_backend`): blocks whose bytes the client verifies ---

    @property
    def node_id(self) -> bytes:
        """Empty: an embedded pool has no node id."""
        return b""

    @property
    def own(self) -> LocalPool:
        """This pool: all of its members are of this machine."""
        return self

    @property
    def read_bytes_per_s(self) -> float:
        """Sum of the members' read bandwidths, bytes per second, from which their shares follow."""
        with self._lock:
            states = zip(self._bandwidths, self._table.members, strict=True)
            return sum(bandwidth.share_bytes_per_s for bandwidth, state in states if bandwidth and not state.gone)

    @property
    def takes_copies(self) -> bool:
        """Whether it has a share of its space for copies."""
        return self._table.quotas.copies_share > 0

    @property
    def block_bytes_max(self) -> int:
        """Size in bytes of the largest block that a member which accepts blocks could hold; 0 when none accepts any."""
        with self._lock:
            return max((self._room_of(number) for number in self._taking()), default=0)

    def expect_blocks(self, block_bytes: int) -> list[str]:
        """Announce that blocks of this size will be written. Returns, and logs, a line for each member that cannot hold
        one."""
        with self._lock:
            small = [(self.members[n].name, self._room_of(n)) for n in self._taking()]
        needed = staging_bytes(block_bytes)
        lines = [
            f"member {name} has room for {format_bytes(room)}, a block takes {format_bytes(needed)}: none is stored "
            "there; allowed: a larger capacity, or fewer tokens per block"
            for name, room in small
            if room < needed
        ]
        for line in lines:
            log.warning("%s", line)
        return lines

    def _taking(self) -> list[int]:
        """Numbers of the members that accept blocks, fenced ones included; the lock is held."""
        return [n for n, state in enumerate(self._table.members) if not state.gone and not state.draining]

    def _room_of(self, number: int) -> int:
        return self._table.members[number].space.capacity_bytes

    def open_block(self, key: BlockKey, size_bytes: int | None) -> OpenBlock | PoolError:
        """Pin a block of `size_bytes` (None: of any size), or return why it cannot be read."""
        with self._lock:
            return self._unready() or self._open(key, size_bytes)

    def open_blocks(self, keys: Sequence[BlockKey], size_bytes: int) -> list[OpenedBlock | PoolError]:
        """As `open_block` of each."""
        with self._lock:
            if (unready := self._unready()) is not None:
                return [unready] * len(keys)
            return [self._open(key, size_bytes) for key in keys]

    def origins(self, keys: Sequence[BlockKey]) -> list[BlockOrigin | None]:
        """What each of these blocks was written with; None for a miss. No use is noted."""
        with self._lock:
            blocks = [self._table.find(key) for key in keys]
        return [BlockOrigin(one.parent, one.tenant, one.rebuild_s) if one is not None else None for one in blocks]

    def _open(self, key: BlockKey, size_bytes: int | None) -> OpenBlock | PoolError:
        """Pin one block; the lock is held."""
        block = self._table.find(key)
        if block is None:
            return PoolError("missing", f"block {key.hex()} is not in the pool")
        if size_bytes is not None and block.size_bytes != size_bytes:
            return PoolError("layout", f"block {key.hex()} has {block.size_bytes} bytes, {size_bytes} were asked for")
        self._table.pin(block)
        member = self.members[block.member]
        return OpenBlock(self, block, member.view(block) if isinstance(member, MemoryMember) else None)

    def note_read(self, opened: OpenBlock) -> None:
        """Count a block that was read in place."""
        self.members[opened.block.member].read_bytes += opened.block.size_bytes

    def load(self, opened: OpenBlock, into: memoryview, timeout_s: float, done: Done) -> None:
        """Copy an open block into `into` without verifying it. A device error drops the block."""
        block = opened.block

        def finished(work: Work, error: PoolError | None) -> None:
            if error is not None and error.reason == "device":
                self._drop(block)
            note_error("load", self.members[block.member].name, error)
            call_done(done, error)

        work = Work("load", block, into, time.monotonic() + timeout_s, finished)
        error = self.members[block.member].put(work)
        if error is not None:
            note_error("load", self.members[block.member].name, error)
            call_soon(self._callbacks, done, error)

    def verify(self, block: Block, data: memoryview, check: ReadCheck | None = None) -> PoolError | None:
        """Check bytes that were read; a block that does not pass is dropped and counted."""
        error = (check or check_of(None, block.key))(data[: block.size_bytes], block.checksum, block.mac)
        if error is None:
            return None
        if error.reason == "checksum":
            self.discard(block.key, block.checksum)
        else:
            self._drop(block)
        return PoolError(error.reason, f"{self.members[block.member].name}: {error.detail}")

    def discard(self, key: BlockKey, checksum: int) -> None:
        """Drop a block that a reader found to differ from `checksum`; ignored when another block has taken its key."""
        with self._lock:
            block = self._table.find(key)
            dropped = block is not None and block.checksum == checksum
            if block is not None and dropped:
                self._checksum_errors += 1
                self._drop_locked(block)
        if dropped:
            note_loss("checksum", "", "block %s did not match its checksum and was dropped", key.hex())

    def suspect(self, key: BlockKey, checksum: int, mac: bytes, refused: bool) -> None:
        """As `pool.node_backend.NodeBackend`; ignored when another block has taken the key."""
        with self._lock:
            block = self._table.find(key)
            same = block is not None and (block.checksum, block.mac) == (checksum, mac)
        if same and refused:
            self._suspects.refuse(key, mac)
        elif same:
            self._suspects.damaged(key, checksum)

    def unpin(self, block: Block) -> None:
        """Undo the pin of `open_block`."""
        with self._lock:
            self._table.unpin(block)

    def check_integrity(self) -> None:
        """Assert the invariants of the table; for tests."""
        with self._lock:
            self._table.check_integrity()

    # --- inside ---

    def _restore(self, number: int, member: Member) -> None:
        stored = member.rows()
        lost = keys_of(stored[self._table.restore_many(number, stored)])
        if lost:
            self.notes.append(f"{member.name}: {len(lost)} rows beyond the slab or doubled, dropped")
            member.forget([key for key in lost if not self._table.holds(key, number)])

    def _follow(self, number: int, member: Member) -> None:
        """Hear of blocks whose rows are lost, and let a durable table have the uses of its blocks."""
        member.on_lost(self._drop)
        if is_durable(member):
            self._table.note_durable(number)
            member.on_flush(lambda limit: self._take_uses(number, member, limit))

    def _take_uses(self, number: int, member: Member, limit: int) -> list[Use]:
        """Uses for a member's table, on its journal's thread; in parts, so that no lock is held long."""
        taken: list[Use] = []
        while len(taken) < limit and self.members[number] is member:
            with self._lock:
                some = self._table.take_uses(number, min(EVICTED_AT_ONCE, limit - len(taken)))
            if not some:
                break
            taken += some
        return taken

    def _drop(self, block: Block) -> None:
        """Make a block that could not be read a miss. Takes the lock."""
        with self._lock:
            if self._table.holds(block.key, block.member) is block:
                self._drop_locked(block)

    def _drop_locked(self, block: Block) -> None:
        self._table.drop(block)
        self.members[block.member].forget([block.key])

    def _drain_ended(self, number: int) -> None:
        """A member has no blocks any more and was closed; called under the lock by its `Drain`."""
        self.members[number] = GoneMember(self.members[number].name)
        drain = self._drains.pop(number, None)
        self._moved_blocks += drain.moved if drain else 0

    def _member_stat(self, number: int) -> MemberStat:
        member, state = self.members[number], self._table.members[number]
        bandwidth = self._bandwidths[number]
        loads, stores = queued(member)
        return MemberStat(
            name=member.name,
            kind=member.kind,
            capacity_bytes=member.capacity_bytes,
            used_bytes=state.space.used_bytes,
            blocks=state.space.blocks,
            healthy=state.healthy,
            weight=self._table.placement.weights[number],
            read_bytes=member.read_bytes,
            written_bytes=member.written_bytes,
            errors=member.errors,
            state=state.label,
            read_bytes_per_s=(bandwidth.observed_bytes_per_s or 0.0) if bandwidth else 0.0,
            queued_loads=loads,
            queued_stores=stores,
        )

    def _check_open(self) -> None:
        if self._closed:
            raise _closed()

    def _unready(self) -> PoolError | None:
        """The error when the pool is closed; else None, and the states of the members are up to date. The lock is
        held."""
        if self._closed:
            return _closed()
        self._check_members()
        return None

    def _check_members(self) -> None:
        """Fence members that fail, use those again that answer again; from time to time, update their read
        bandwidths."""
        for number, member in enumerate(self.members):
            healthy = fenced_reason(member) is None
            if self._table.members[number].healthy != healthy:
                self._table.set_healthy(number, healthy)
        now_s = time.monotonic()
        if now_s >= self._next_observation_s:
            self._next_observation_s = now_s + OBSERVE_EVERY_S
            self._observe(now_s)

    def _observe(self, now_s: float) -> None:
        for number, (member, bandwidth) in enumerate(zip(self.members, self._bandwidths, strict=True)):
            if bandwidth is None:
                continue
            bandwidth.observe(*observed(member))
            changed = bandwidth.change(now_s) if self._follow_bandwidth else None
            if changed is not None and not self._table.members[number].gone:
                self._table.placement.set_weight(number, changed)
                log.warning("%s reads at %.0f MB/s: its share is adjusted", member.name, changed / 1e6)


def _in_turns(keys: Sequence[BlockKey], at_once: int = KEYS_AT_ONCE) -> Iterator[Sequence[BlockKey]]:
    """The keys in parts, at least one part; between two parts, a thread that waits for the lock gets it."""
    yield keys[:at_once]
    for at in range(at_once, len(keys), at_once):
        time.sleep(0)
        yield keys[at : at + at_once]


def _closed() -> PoolError:
    return PoolError("closed", "the pool is closed")


def _bandwidth(weight: float) -> MemberBandwidth | None:
    return MemberBandwidth(weight) if weight > 0 else None
