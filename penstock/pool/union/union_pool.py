"""The pools of several hosts as one: a local pool, if there is one, and any number of pool nodes.

UNION-1  Statement: New blocks are spread over the children by bandwidth (`core.pool.striping`). A child's weight is the
         bandwidth at which its members can be read from here, so a node's is bounded by its link. Engines with the same
         weights place a block alike, and a child's own members get its blocks in turn.
UNION-2  Statement: Children that are up share the blocks. A block for which one has no room, or that it refuses, is
         offered to the next. When none has room, the first in order evicts.
UNION-3  Statement: Requests go to all children at once, with one deadline. A child that fails or is late counts as
         misses, and its failure is counted.
UNION-4  Statement: A block that several children hold is read from the local pool first, then from the nodes by weight.
         Where nodes take copies, of the two that hold a hot block the less loaded one (`union.replicas`).
UNION-5  Statement: A child that is down makes its blocks misses, but for those that have a copy, and never the pool
         unusable; it is used again when it is back.
Verification: tests/pool/union.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from penstock.core.keys import BlockKey, split_keys
from penstock.core.new_block import NewBlock
from penstock.pool.api import Done, DoneMany, Lease, Located, MemberStat, PoolError, PoolStat, ReadCheck, check_write
from penstock.pool.callbacks import call_done, call_soon, callback_worker
from penstock.pool.device_twin import DeviceTwin
from penstock.pool.losses import note_error, note_loss
from penstock.pool.node_backend import BlockOrigin, NodeBackend, OpenedBlock
from penstock.pool.spans import Gather, PartEnded
from penstock.pool.union.child import BlockEnded, Child, NodePool
from penstock.pool.union.children import Children
from penstock.pool.union.locations import Locations
from penstock.pool.union.replicas import Replicas
from penstock.pool.union.run_placement import RunPlacement

log = logging.getLogger(__name__)

_GONE = ("missing", "layout", "checksum", "device")  # reads that end so: the block is not there
_TRY_NEXT = ("network", "closed", "full", "device")  # writes that end so may go to another child


@dataclass(frozen=True, slots=True)
class _Placed:
    """A block of a span that is written to one child: its `parent` there, and the `others` to try next."""

    block: NewBlock
    data: memoryview
    parent: BlockKey
    others: list[int]
    done: Done


class UnionPool:
    """Children as one pool. Contract: `pool.api.Pool`, and `pool.node_backend.NodeBackend` for a node that serves
    it."""

    def __init__(
        self,
        local: NodeBackend | None,
        nodes: Sequence[NodePool],
        weights: Sequence[float | None] | None = None,
        node_id: bytes = b"",
        follow_bandwidth: bool = True,
        open_node: Callable[[str], NodePool] | None = None,
    ) -> None:
        """Owns the children from now on. `weights` are bytes per second, the local pool's first if there is one. None
        for a node: its link is measured as soon as it is up; None for the local pool: the sum of its members' weights.
        `node_id`: the id by which the nodes know this process, if it is a node itself. `follow_bandwidth`: a node's
        share falls when its reads become slower. `open_node` opens the node at an address, for further processes of
        nodes, which they name (None: these are left out).

        Raises ValueError when two addresses are one node, or PoolError("network") when no child can be used; the
        children are closed then.
        """
        self.node_id = node_id
        self._callbacks = callback_worker()
        try:
            # A node with members of its own is itself a node of the others' maps, under an address it does not know.
            by_slots = local is None or not node_id
            self._locations = Locations(len(nodes) + (local is not None))
            grown = self._locations.add_child
            self._children = Children(local, nodes, weights, follow_bandwidth, by_slots, grown, open_node)
        except BaseException:
            self._callbacks.close(1.0)
            raise
        self._local = local
        self._lock = self._children.lock
        self._runs = RunPlacement(self._children, self._locations)
        self._replicas = Replicas(self._children, self._locations)

    @property
    def weights(self) -> dict[str, float]:
        """Each child's share of new blocks: "local", and nodes by their address."""
        with self._lock:
            pairs = zip(self._children.all, self._children.shares, strict=True)
            return {child.name: share for child, share in pairs if not child.left}

    @property
    def failures(self) -> dict[str, int]:
        """Lookups that each child did not answer."""
        return {child.name: child.failures for child in self._children.all if not child.left}

    # --- nodes that come and go ---

    def add_node(self, node: NodePool, weight: float | None) -> None:
        """Add a node, owned and used from now on. Raises ValueError when it is a child already."""
        self._children.add(node, weight)

    def drop_node(self, place: str, timeout_s: float) -> None:
        """Stop using the node at this address, with the processes that it named: its blocks are misses from now on, but
        are not removed there. Reads under way may end within `timeout_s`."""
        self._children.drop(place, timeout_s)

    def set_node_weight(self, place: str, weight: float) -> None:
        """Set a node's weight: bytes per second, or a share where the others have shares."""
        self._children.set_weight(place, weight)

    # --- the interface ---

    @property
    def up(self) -> bool:
        """Whether any child can be used now."""
        return any(child.up for child in self._children.all)

    def register(self, buffer: memoryview, twin: DeviceTwin | None = None) -> None:
        """Announce staging memory to every child, also to nodes that are added later."""
        self._children.register(buffer, twin)

    def lookup(self, keys: Sequence[BlockKey], timeout_s: float) -> list[Located | None]:
        """Ask all children at once, of many only the owners of the blocks; each block's best place, None where no child
        that answered has it."""
        found = self._look_up(keys, timeout_s)
        self._replicas.note_lookup(keys, found)
        return found

    def _look_up(self, keys: Sequence[BlockKey], timeout_s: float) -> list[Located | None]:
        if self._runs:
            return self._runs.lookup(keys, timeout_s)
        answers = self._children.ask_all(
            lambda node: node.begin_lookup(keys, timeout_s), lambda local: local.lookup(keys, timeout_s)
        )
        with self._lock:
            for child, answer in zip(self._children.all, answers, strict=False):
                self._children.note_answer(child, answer)
            found = [None if isinstance(answer, PoolError) else answer for answer in answers]
            if all(answer is None for answer in found):
                raise next(answer for answer in answers if isinstance(answer, PoolError))
            asked = [number for number in self._children.preference() if number < len(found)]
            return self._locations.note_prefix(keys, found, asked)

    def read(
        self,
        key: BlockKey,
        size_bytes: int,
        into: memoryview,
        timeout_s: float,
        done: Done,
        check: ReadCheck | None = None,
    ) -> None:
        """Read from the child where the block was last found, and meter the read."""
        if self._replicas.on:
            checks = [check]
            self.read_many([key], size_bytes, [into], timeout_s, lambda errors: call_done(done, errors[0]), checks)
            return
        child = self._holder(key)
        if child is None or child.node is None:
            if self._local is not None:
                self._local.read(key, size_bytes, into, timeout_s, done, check)
            else:
                call_soon(self._callbacks, done, _unknown(key))
            return
        self.read_of_node(child, key, size_bytes, into, timeout_s, lambda *ended: call_done(done, ended[-1]), check)

    def read_many(
        self,
        keys: Sequence[BlockKey],
        size_bytes: int,
        intos: Sequence[memoryview],
        timeout_s: float,
        done: DoneMany,
        checks: Sequence[ReadCheck | None] | None = None,
    ) -> None:
        """Read each block from the child where it was last found, those of one child together; a block that two nodes
        hold from the less loaded one, or from the other where that fails."""
        by_child = self._readers(keys, size_bytes)
        gather = Gather(len(keys), done)
        for child, some in by_child.items():
            found = [checks[at] for at in some] if checks is not None else None
            span = [keys[at] for at in some], size_bytes, [intos[at] for at in some], timeout_s
            if child is not None and child.node is not None:
                ended = gather.part(some)
                if self._replicas.on:
                    ended = self._replicas.or_from_other(child, *span, ended, found, self._read_from)
                self._read_from(child, *span, ended, found)
            elif self._local is not None:
                self._local.read_many(*span, gather.part(some), found)
            else:
                for at in some:
                    call_soon(self._callbacks, gather.one(at), _unknown(keys[at]))

    def _readers(self, keys: Sequence[BlockKey], size_bytes: int) -> Mapping[Child | None, Sequence[int]]:
        """The child that each block is read from, with the numbers of its blocks."""
        by_child: dict[Child | None, list[int]] = {}
        with self._lock:
            for at, key in enumerate(keys):
                by_child.setdefault(self._held_by(key), []).append(at)
            if not self._replicas.on:
                return by_child
            return self._replicas.spread(keys, size_bytes, by_child)

    def _read_from(
        self,
        child: Child,
        keys: Sequence[BlockKey],
        size_bytes: int,
        intos: Sequence[memoryview],
        timeout_s: float,
        ended: PartEnded,
        checks: Sequence[ReadCheck | None] | None,
    ) -> None:
        assert child.node is not None
        child.node.read_many(keys, size_bytes, intos, timeout_s, self._metered(child, keys, size_bytes, ended), checks)

    def _metered(self, child: Child, keys: Sequence[BlockKey], size_bytes: int, ended: PartEnded) -> DoneMany:
        """Meter a span that is read from a node from now on, and note which of its blocks are not there."""

        def end(errors: list[PoolError | None]) -> None:
            moved = size_bytes * sum(error is None for error in errors)
            with self._lock:
                child.reading_bytes -= size_bytes * len(keys)
                child.meter.ended(1, moved, time.monotonic())
                for key, error in zip(keys, errors, strict=True):
                    self._note_failed(child, key, error)
            ended(errors)

        with self._lock:
            child.reading_bytes += size_bytes * len(keys)
            child.meter.started(time.monotonic())
        return end

    def _note_failed(self, child: Child, key: BlockKey, error: PoolError | None) -> None:
        """Forget a block that could not be read from the child, where that says so; the lock is held."""
        if error is not None and error.reason == "mac":
            self._locations.refuse(key, self._children.all.index(child))
        elif error is not None and error.reason in _GONE:
            self._locations.forget(key, self._children.all.index(child))

    def read_of_node(
        self,
        child: Child,
        key: BlockKey,
        size_bytes: int,
        into: memoryview,
        timeout_s: float,
        ended: BlockEnded,
        check: ReadCheck | None = None,
    ) -> None:
        """Read from a node, with metering; `ended` gets checksum and MAC too."""
        assert child.node is not None

        def end(checksum: int, mac: bytes, error: PoolError | None) -> None:
            with self._lock:
                child.reading_bytes -= size_bytes
                child.meter.ended(1, 0 if error else size_bytes, time.monotonic())
                self._note_failed(child, key, error)
            ended(checksum, mac, error)

        with self._lock:
            child.reading_bytes += size_bytes
            child.meter.started(time.monotonic())
        child.node.read_block(key, size_bytes, into, timeout_s, end, check)

    def other_holder(self, key: BlockKey, child: Child, error: PoolError | None) -> Child | None:
        """The node that has a copy of a block whose read from `child` ended so; None where there is none."""
        with self._lock:
            return self._replicas.other(key, child, error)

    def note_saved_read(self) -> None:
        """Count a block that was read from its other holder."""
        with self._lock:
            self._replicas.saved_reads += 1

    def lease(self, key: BlockKey) -> Lease | None:
        """A block of the local child in place; None when it is elsewhere or unknown."""
        child = self._holder(key)
        if self._local is None or (child is not None and child.node is not None):
            return None
        return self._local.lease(key)

    def host_buffers(self) -> list[memoryview]:
        """The buffers of the local child; none without one."""
        return self._local.host_buffers() if self._local is not None else []

    def write(self, block: NewBlock, data: memoryview, timeout_s: float, done: Done) -> None:
        """Write to the child that the placement chooses, and to the next one where it is refused or fails, within
        `timeout_s`."""
        error = check_write(block, data)
        if error is not None:
            call_soon(self._callbacks, done, error)
            return
        ready = self._order(block)
        self._write_to(ready, block, data, time.monotonic() + timeout_s, done, PoolError("network", "no child is up"))

    def write_many(
        self, blocks: Sequence[NewBlock], datas: Sequence[memoryview], timeout_s: float, done: DoneMany
    ) -> None:
        """As `write` of each block; those whose placement begins with the same child are sent to it together."""
        until_s = time.monotonic() + timeout_s
        gather = Gather(len(blocks), done)
        spans: dict[int, list[_Placed]] = {}
        before: NewBlock | None = None
        root, last_on = b"", dict[int, BlockKey]()  # of the prefix that these blocks continue: its end, on each child
        for at, (block, data) in enumerate(zip(blocks, datas, strict=True)):
            error = check_write(block, data)
            if before is None or block.parent != before.key:
                root, last_on = block.parent, {}
            order = self._order(block) if error is None else []
            before = block
            if not order:
                self.write(block, data, timeout_s, gather.one(at))
                continue
            child, *others = order
            with self._lock:
                parent = last_on.get(child) or self._locations.parent_on(child, root)
            last_on[child] = block.key
            spans.setdefault(child, []).append(_Placed(block, data, parent, others, gather.one(at)))
        for child, span in spans.items():
            self._write_span(child, span, until_s)

    def _write_span(self, at: int, span: list[_Placed], until_s: float) -> None:
        """Write blocks to one child, and each that it refuses to the next in that block's order."""
        child = self._children.all[at]

        def written(errors: list[PoolError | None]) -> None:
            for one, error in zip(span, errors, strict=True):
                if error is not None and error.reason in _TRY_NEXT and not self._children.closing:
                    self._write_to(one.others, one.block, one.data, until_s, one.done, error)
                    continue
                if error is None:
                    self._note_written(one.block, at)
                call_done(one.done, error)

        with self._lock:
            placed = [self._as_stored(at, one.block, one.parent) for one in span]
            for one in span:
                child.note_written(one.block.size_bytes)
        child.pool.write_many(placed, [one.data for one in span], until_s - time.monotonic(), written)

    def evict(self, keys: Sequence[BlockKey]) -> int:
        """Drop the blocks at every child; how many were dropped in all. A child that fails is logged and counts 0."""
        answers = self._children.ask_all(lambda node: node.begin_evict(keys), lambda local: local.evict(keys))
        for child, answer in zip(self._children.all, answers, strict=False):
            if isinstance(answer, PoolError) and not child.left:
                note_error("evict", child.name, answer)
        return sum(answer for answer in answers if not isinstance(answer, PoolError))

    def stat(self, timeout_s: float) -> PoolStat:
        """State of all children. Members of nodes have the node's address behind their name, and a part of the node's
        share. Those of a node that does not answer are shown as last reported, and as not healthy."""
        answers = self._children.ask_all(lambda node: node.begin_stat(timeout_s), lambda local: local.stat(timeout_s))
        if all(isinstance(answer, PoolError) for answer in answers):
            raise next(answer for answer in answers if isinstance(answer, PoolError))
        members: list[MemberStat] = []
        counted: list[PoolStat] = []
        with self._lock:
            shares = self._children.shares
            for child, answer, share in zip(self._children.all, answers, shares, strict=False):
                if child.left:
                    continue
                if isinstance(answer, PoolStat):
                    child.note_stat(answer)
                    counted.append(answer)
                    members += [replace(m, weight=m.weight * share) for m in answer.members]
                else:
                    members += [replace(m, weight=m.weight * share) for m in _absent(child)]
        return PoolStat(
            tuple(members),
            sum(stat.writes_dropped for stat in counted),
            sum(stat.evictions for stat in counted),
            sum(stat.checksum_errors for stat in counted),
            sum(stat.writes_not_admitted for stat in counted),
            sum(stat.moved_blocks for stat in counted) + self._runs.moved,
            _added_up(stat.tenants for stat in counted),
            _added_up(stat.losses for stat in counted),
            _added_up(stat.thread_failures for stat in counted),
            _added_up(stat.over_quota for stat in counted),
            _added_up(stat.evictions_by for stat in counted),
            sum(stat.writes_refused for stat in counted),
            copies=_added_up(stat.copies for stat in counted),
            copied_blocks=self._replicas.copied + sum(stat.copied_blocks for stat in counted),
            copy_reads=self._replicas.copy_reads + sum(stat.copy_reads for stat in counted),
            saved_reads=self._replicas.saved_reads + sum(stat.saved_reads for stat in counted),
        )

    def close(self, timeout_s: float) -> None:
        """Close the children, then end callbacks, within about `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        self._children.close(timeout_s)  # which ends what the mover waits for
        self._runs.close(max(0.1, deadline_s - time.monotonic()))
        self._replicas.close(max(0.1, deadline_s - time.monotonic()))
        self._callbacks.close(max(0.1, deadline_s - time.monotonic()))

    # --- for a pool node: `pool.node_backend` ---

    @property
    def own(self) -> NodeBackend | None:
        """The local child; None when all children are nodes."""
        return self._local

    @property
    def read_bytes_per_s(self) -> float:
        """Sum of the children's read bandwidths, bytes per second."""
        return self._children.read_bytes_per_s

    @property
    def takes_copies(self) -> bool:
        """False: this pool makes copies on its nodes itself."""
        return False

    @property
    def block_bytes_max(self) -> int:
        """Size in bytes of the largest block that any child accepts."""
        return self._children.block_bytes_max

    def expect_blocks(self, block_bytes: int) -> list[str]:
        """Announce that blocks of this size will be written and read; returns a line for each child that cannot hold
        them."""
        return self._children.expect_blocks(block_bytes)

    def locate(self, keys: bytes, timeout_s: float) -> Located | list[Located | None]:
        """As `lookup`, of keys that are concatenated."""
        return self.lookup(split_keys(keys), timeout_s)

    def open_block(self, key: BlockKey, size_bytes: int) -> OpenedBlock | PoolError:
        """Pin a block at the child where it was last found, or return why it cannot be read."""
        child = next(iter(self._readers([key], size_bytes)))
        if child is not None and child.node is not None:
            return _NodeBlock(self, child, key, size_bytes)
        if self._local is None:
            return _unknown(key)
        return self._local.open_block(key, size_bytes)

    def open_blocks(self, keys: Sequence[BlockKey], size_bytes: int) -> list[OpenedBlock | PoolError]:
        """As `open_block` of each."""
        return [self.open_block(key, size_bytes) for key in keys]

    def origins(self, keys: Sequence[BlockKey]) -> list[BlockOrigin | None]:
        """None for each: blocks are moved by who reaches their nodes directly."""
        return [None] * len(keys)

    def suspect(self, key: BlockKey, checksum: int, mac: bytes, refused: bool) -> None:
        """Forward a reader's report about a block to the child where the block was last found."""
        child = self._holder(key)
        if child is not None and child.node is not None:
            child.node.suspect(key, checksum, mac, refused)
        elif self._local is not None:
            self._local.suspect(key, checksum, mac, refused)

    # --- asking ---

    def _holder(self, key: BlockKey) -> Child | None:
        with self._lock:
            return self._held_by(key)

    def _held_by(self, key: BlockKey) -> Child | None:
        """As `_holder`; the lock is held."""
        found = self._locations.find(key)
        child = self._children.all[found] if found is not None else None
        return child if child is not None and not child.left else None

    # --- writing ---

    def _write_to(
        self, ready: list[int], block: NewBlock, data: memoryview, deadline_s: float, done: Done, last: PoolError
    ) -> None:
        """Write to the first child of `ready`, or the next one when it refuses; `last` is the error of the one
        before."""
        remaining_s = deadline_s - time.monotonic()
        if not ready or remaining_s <= 0:
            note_error("store", "the pool", last)
            call_soon(self._callbacks, done, last)
            return
        at, *others = ready
        child = self._children.all[at]

        def written(error: PoolError | None) -> None:
            if error is not None and error.reason in _TRY_NEXT and not self._children.closing:
                self._write_to(others, block, data, deadline_s, done, error)
                return
            if error is None:
                self._note_written(block, at)
            call_done(done, error)

        with self._lock:
            placed = self._as_stored(at, block, self._locations.parent_on(at, block.parent))
            child.note_written(block.size_bytes)
        child.pool.write(placed, data, remaining_s, written)

    def _order(self, block: NewBlock) -> list[int]:
        """The children that a new block is offered to, in this order."""
        return self._runs.order(block) if self._runs else self._children.order(block.position, block.size_bytes)

    def _as_stored(self, at: int, block: NewBlock, parent: BlockKey) -> NewBlock:
        """The block as a child stores it, with its nearest ancestor there as its parent; the lock is held."""
        if self._runs:
            return self._runs.as_stored(block)
        return replace(block, parent=parent, position=self._children.position_on(at, block.position))

    def _note_written(self, block: NewBlock, at: int) -> None:
        with self._lock:
            if self._runs:
                self._locations.note_stored(block.key, at)
            else:
                self._locations.note_written(block.key, block.parent, at)


def _unknown(key: BlockKey) -> PoolError:
    """The error of a read of a block that was not looked up before, or whose place was forgotten since."""
    note_loss(
        "location_unknown", "", "block %s is read, but was not looked up before, or its place was forgotten", key.hex()
    )
    return PoolError("missing", f"block {key.hex()} was not looked up before")


class _NodeBlock:
    """A block on another node, read for a client of this node. It is not pinned there, so it may be gone when it is
    read. Contract: `pool.node_backend.OpenedBlock`."""

    view = None
    remote = True

    def __init__(self, union: UnionPool, child: Child, key: BlockKey, size_bytes: int) -> None:
        self._union, self._child = union, child
        self.key = key
        self.checksum, self.mac = 0, b""
        self._size_bytes = size_bytes

    def load(self, into: memoryview, timeout_s: float, done: Done) -> None:
        deadline_s, first = time.monotonic() + timeout_s, self._child

        def ended(checksum: int, mac: bytes, error: PoolError | None) -> None:
            left_s = deadline_s - time.monotonic()
            other = self._union.other_holder(self.key, self._child, error) if left_s > 0 else None
            if other is not None:
                self._child = other
                self._union.read_of_node(other, self.key, self._size_bytes, into, left_s, ended)
                return
            if error is None and self._child is not first:
                self._union.note_saved_read()
            self.checksum, self.mac = checksum, mac
            call_done(done, error)

        self._union.read_of_node(self._child, self.key, self._size_bytes, into, timeout_s, ended)

    def note_read(self) -> None:
        """Do nothing: the other node counts it."""

    def release(self) -> None:
        """Do nothing: nothing is pinned."""


def _added_up(counts: Iterable[Sequence[tuple[str, int]]]) -> tuple[tuple[str, int], ...]:
    """Sums by name over all children, such as the bytes of each tenant; the largest first."""
    total: Counter[str] = Counter()
    for counted in counts:
        for name, count in counted:
            total[name] += count
    return tuple(total.most_common())


def _absent(child: Child) -> tuple[MemberStat, ...]:
    """The members of a child that does not answer, as it last reported them."""
    if child.stat is not None:
        return tuple(replace(member, healthy=False, state="down") for member in child.stat.members)
    return (MemberStat(f"node@{child.name}", "node", 0, 0, 0, False, 1.0, 0, 0, 0, "down"),)
