"""Copies of hot blocks on second nodes of a union: made in the background, and read where less is queued.

Which blocks are hot is counted by each node that takes copies, over the reads of all its clients (`core.pool.heat`);
what copies may take of a node's space is that node's decision (`core.pool.copies`). Everything is off until a node says
that it takes copies.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Generic, TypeVar

from penstock.core.keys import BlockKey
from penstock.core.new_block import NewBlock, prefix_position
from penstock.core.pool.copies import split_reads
from penstock.core.pool.placement import copy_node
from penstock.core.pool.runs import begins_run
from penstock.pool.api import Located, PoolError, ReadCheck
from penstock.pool.losses import count_loss, note_error
from penstock.pool.spans import Gather, PartEnded
from penstock.pool.union.block_copier import TIMEOUT_S, Move, copy_piece, pause_after, pieces_of
from penstock.pool.union.child import Child
from penstock.pool.union.children import Children
from penstock.pool.union.locations import Locations
from penstock.process.guarded_thread import GuardedWorker
from penstock.units import parse_address

Value = TypeVar("Value")
ReadFrom = Callable[
    [Child, Sequence[BlockKey], int, Sequence[memoryview], float, PartEnded, Sequence[ReadCheck | None] | None], None
]

KNOWN_MAX = 1 << 17  # blocks whose parts, and blocks whose copies, are remembered
WAITING_MAX = 256  # parts of prefixes that wait to be copied
AGAIN_S = 10.0  # until the copies of a part that stays hot are looked at again
FULL_S = 60.0  # the same where a node had no room for a copy
_STAYS = ("network", "closed", "dropped")  # reads that end so may find the block elsewhere, and later here
_ELSEWHERE = (*_STAYS, "missing", "layout", "checksum", "mac", "device")  # and these elsewhere only


class _Latest(Generic[Value]):
    """The values of the keys that were set last: at least half of `capacity`."""

    def __init__(self, capacity: int) -> None:
        self._half = max(1, capacity // 2)
        self._new: dict[BlockKey, Value] = {}
        self._old: dict[BlockKey, Value] = {}

    def __len__(self) -> int:
        return len(self._new) + len(self._old)

    def get(self, key: BlockKey) -> Value | None:
        value = self._new.get(key)
        return value if value is not None else self._old.get(key)

    def set(self, keys: Sequence[BlockKey], value: Value) -> None:
        if len(self._new) >= self._half:
            self._new, self._old = {}, self._new
        self._new.update(dict.fromkeys(keys, value))

    def drop(self, key: BlockKey) -> None:
        self._new.pop(key, None)
        self._old.pop(key, None)


class Replicas:
    """Makes copies, and chooses among the holders of a block. The children's lock guards all of it.

    COPY-1  Statement: A copy has the bytes, checksum and MAC of the original, and is asked for where every lookup asks:
            at all nodes of a striped pool, else at the node that stands in for the owner of its run while that is down.
            So a lost node costs no hit of a block that two nodes held, and cold blocks cost no further question.
    COPY-2  Statement: Blocks are copied with the part of their prefix before them, in at most TIME_SHARE of the time of
            one thread, with one piece on its way; what does not fit into the queue is copied when it is read again.
    COPY-3  Statement: A block that two nodes hold is read from the one whose queue is shorter in time; where that one
            fails, within the same time from the other.
    COPY-4  Statement: While no node takes copies, nothing is counted, asked or copied.
    Verification: tests/pool/union/test_replicas.py.
    """

    def __init__(self, children: Children, locations: Locations) -> None:
        self._children, self._locations, self._lock = children, locations, children.lock
        self._closing = threading.Event()
        self._parts: _Latest[tuple[BlockKey, ...]] = _Latest(KNOWN_MAX)  # of each block: from the part's first one on
        self._copies: _Latest[tuple[int, ...]] = _Latest(KNOWN_MAX)  # the two nodes that held a block, or what is left
        self._again: _Latest[tuple[float, int]] = _Latest(WAITING_MAX * 16)  # by a part's first block: when, how many
        self._not_before_s: _Latest[float] = _Latest(KNOWN_MAX)  # of blocks whose copies left, or found no room
        self._worker: GuardedWorker | None = None  # from the first copy on
        children.on_hot = self.note_hot
        self.copied = self.copy_reads = self.saved_reads = 0

    @property
    def on(self) -> bool:
        """Whether any node takes copies."""
        return self._children.take_copies

    # --- lookups and reads ---

    def note_lookup(self, keys: Sequence[BlockKey], hits: Sequence[Located | None]) -> None:
        """Remember the parts of a prefix that was found, up to the first miss."""
        if not self.on:
            return
        end = next((at for at, hit in enumerate(hits) if hit is None), len(keys))
        begins = [at for at in range(1, end) if begins_run(keys[at])]
        with self._lock:
            for begin, until in zip([0, *begins], [*begins, end], strict=True):
                if begin < until and self._parts.get(keys[until - 1]) is None:
                    self._parts.set(keys[begin:until], tuple(keys[begin:until]))

    def note_hot(self, keys: Sequence[BlockKey]) -> None:
        """Have blocks copied that were read here and that are read often, as their node says."""
        if not self.on:
            return
        now_s = time.monotonic()
        wanted: dict[BlockKey, tuple[BlockKey, ...]] = {}  # by a part's first block: up to its last hot one
        with self._lock:
            for key in keys:
                part = self._parts.get(key)
                if part is not None:
                    hot = part[: part.index(key) + 1]
                    wanted[part[0]] = max(hot, wanted.get(part[0], ()), key=len)
            todo = [part for part in wanted.values() if self._is_due(part, now_s)]
            for part in todo:
                self._again.set(part[:1], (now_s + AGAIN_S, len(part)))
        for part in todo:
            self._offer(part)

    def _is_due(self, part: tuple[BlockKey, ...], now_s: float) -> bool:
        """Whether copies are looked at now: for the first time, again, or of more blocks than the last time."""
        again_s, blocks = self._again.get(part[0]) or (0.0, 0)
        return now_s >= again_s or len(part) > blocks

    def spread(
        self, keys: Sequence[BlockKey], size_bytes: int, found: Mapping[Child | None, Sequence[int]]
    ) -> Mapping[Child | None, Sequence[int]]:
        """The children to read blocks from, by number in `keys`, those that two nodes hold by their queues. The lock is
        held. `found`: where each was found."""
        if not len(self._copies):
            return found
        spread: dict[Child | None, list[int]] = {}
        twice: list[tuple[int, Child | None, list[int]]] = []
        for child, some in found.items():
            local = child is not None and child.node is None
            for at in some:
                holders = [] if local else self._holders(keys[at])
                if len(holders) > 1 or (holders and (child is None or not child.up)):
                    twice.append((at, child, holders))
                else:
                    spread.setdefault(child, []).append(at)
        nodes = {one: self._children.all[one] for _, _, some in twice for one in some}
        queued = {one: float(node.reading_bytes) for one, node in nodes.items()}
        for child, some in spread.items():
            if child is not None and child in nodes.values():
                queued[self._children.all.index(child)] += size_bytes * len(some)
        rates = {one: node.read_bytes_per_s for one, node in nodes.items()}
        chosen = split_reads([some for _, _, some in twice], size_bytes, queued, rates)
        for (at, child, _), one in zip(twice, chosen, strict=True):
            self.copy_reads += nodes[one] is not child
            spread.setdefault(nodes[one], []).append(at)
        return spread

    def other(self, key: BlockKey, child: Child, error: PoolError | None) -> Child | None:
        """The node to read a block from after a read from `child` ended so; None where that is of no use. A holder that
        has not the block any more is forgotten. The lock is held."""
        if error is None or error.reason not in _ELSEWHERE or self._children.closing:
            return None
        children, known = self._children.all, self._copies.get(key) or ()
        others = tuple(one for one in known if children[one] is not child)
        if error.reason not in _STAYS and others:  # reads of the same block that are on their way go there too
            self._copies.set((key,), others)
        return next((children[one] for one in others if children[one].up), None)

    def or_from_other(
        self, child: Child, keys: Sequence[BlockKey], size_bytes: int, intos: Sequence[memoryview], timeout_s: float,
        ended: PartEnded, checks: Sequence[ReadCheck | None] | None, read_from: ReadFrom,
    ) -> PartEnded:  # fmt: skip
        """What is called when a span that is read from `child` has ended: blocks that failed are read from their other
        holders, then `ended` is called."""
        deadline_s = time.monotonic() + timeout_s

        def end(errors: Sequence[PoolError | None]) -> None:
            left_s, again = deadline_s - time.monotonic(), dict[int, list[int]]()
            if left_s > 0 and any(errors):
                with self._lock:
                    for at, error in enumerate(errors):
                        other = self.other(keys[at], child, error)
                        if other is not None:
                            again.setdefault(self._children.all.index(other), []).append(at)
            if not again:
                ended(errors)
                return
            numbers = [at for some in again.values() for at in some]
            gather = Gather(len(numbers), partial(self._read_again, numbers, errors, ended))
            first = 0
            for number, some in again.items():
                part = gather.part(range(first, first + len(some)))
                first += len(some)
                found = [checks[at] for at in some] if checks is not None else None
                other = self._children.all[number]
                read_from(other, [keys[at] for at in some], size_bytes, [intos[at] for at in some], left_s, part, found)

        return end

    def _read_again(
        self, numbers: Sequence[int], errors: Sequence[PoolError | None], ended: PartEnded,
        again: Sequence[PoolError | None],
    ) -> None:  # fmt: skip
        results = list(errors)
        for at, error in zip(numbers, again, strict=True):
            results[at] = error
        with self._lock:
            self.saved_reads += sum(error is None for error in again)
        ended(results)

    def close(self, timeout_s: float) -> None:
        """Begin no further copy, and end the thread within about `timeout_s`."""
        with self._lock:
            self._closing.set()
            worker = self._worker
        if worker is not None:
            worker.close(timeout_s)

    def _holders(self, key: BlockKey) -> list[int]:
        """The nodes that hold a block, of those that are up; empty unless two held it."""
        return [one for one in self._copies.get(key) or () if self._children.all[one].up]

    # --- copies ---

    def _offer(self, part: tuple[BlockKey, ...]) -> None:
        """Copy a part of a prefix later."""
        with self._lock:
            if self._closing.is_set():
                return
            try:
                worker = self._worker = self._worker or GuardedWorker("penstock-replicas", WAITING_MAX)
            except (RuntimeError, MemoryError):  # the operating system starts no thread now
                count_loss("copies_dropped", len(part))
                return
        if not worker.put(partial(self._copy, part)):
            count_loss("copies_dropped", len(part))

    def _copy(self, part: tuple[BlockKey, ...]) -> None:
        """Find out which blocks of a part have no copy yet, and make it."""
        moves: dict[tuple[int, int], list[Move]] = {}
        for move in self._missing(part):
            moves.setdefault((move.source, move.size_bytes), []).append(move)
        for some in moves.values():
            for piece in pieces_of(some):
                if self._closing.is_set():
                    return
                begin_s = time.monotonic()
                ended = threading.Semaphore(0)
                try:
                    writes = copy_piece(self._children, piece, partial(self._written, piece, ended))
                except PoolError as error:
                    note_error("copy", self._children.all[piece[0].source].name, error)
                    writes = 0
                for _ in range(writes):
                    ended.acquire(timeout=2 * TIMEOUT_S)  # a pool calls back by the deadline, or when it is closed
                self._closing.wait(pause_after(begin_s))

    def _written(
        self, piece: Sequence[Move], ended: threading.Semaphore, target: int,
        blocks: Sequence[NewBlock], errors: Sequence[PoolError | None],
    ) -> None:  # fmt: skip
        sources = {move.key: move.source for move in piece}
        with self._lock:
            for block, error in zip(blocks, errors, strict=True):
                if error is None:
                    self._copies.set((block.key,), (sources[block.key], target))
                    self.copied += 1
                elif error.reason == "full":  # copies have their share there, or the rest is in use
                    self._not_before_s.set((block.key,), time.monotonic() + FULL_S)
        ended.release()

    def _missing(self, part: tuple[BlockKey, ...]) -> Iterator[Move]:
        """The copies to make of a part; those that are there are noted."""
        now_s = time.monotonic()
        for keys, holders in self._groups(part):
            answers = self._children.ask_keys(dict.fromkeys(holders, keys), TIMEOUT_S)
            found = {one: answer for one, answer in answers.items() if not isinstance(answer, PoolError)}
            before: dict[int, BlockKey] = {}
            for at, key in enumerate(keys):
                hits = {one: hit for one in found if (hit := found[one][at]) is not None}
                if len(hits) > 1:
                    with self._lock:
                        self._copies.set((key,), tuple(hits)[:2])
                if len(hits) != 1 or not self._may_copy(key, found, now_s):
                    continue
                ((source, hit),) = hits.items()
                target = self._target(key, source, holders)
                if target is not None:
                    number = part.index(key)
                    parent = before.get(target) or (part[number - 1] if number else None)
                    before[target] = key
                    position = prefix_position(part[0], number)
                    yield Move(key, parent, hit.size_bytes, position, source, target, copy=True)

    def _may_copy(self, key: BlockKey, answered: Container[int], now_s: float) -> bool:
        """Whether to copy a block that one of the nodes which answered has. Where its copy was known, and has left, it
        is made again later only, so that hot blocks which do not fit beside each other are not copied over and over."""
        with self._lock:
            known = self._copies.get(key) or ()
            if any(self._children.all[one].up and one not in answered for one in known):
                return False
            if known and all(self._children.all[one].up for one in known):
                self._copies.drop(key)
                self._not_before_s.set((key,), now_s + FULL_S)
            return now_s >= (self._not_before_s.get(key) or 0.0)

    def _groups(self, part: tuple[BlockKey, ...]) -> Iterator[tuple[Sequence[BlockKey], list[int]]]:
        """Blocks of a part, and the nodes that hold them or may get their copies: all of a striped pool, else those of
        each run, which ends where the next blocks lie elsewhere."""
        children, slots = self._children.all, self._children.slots
        if not slots:
            yield part, [at for at, child in enumerate(children) if child.node is not None and child.up]
            return
        with self._lock:
            places = [self._locations.find(key) for key in part]
        for place, some in groupby(range(len(part)), lambda at: places[at]):
            keys = [part[at] for at in some]
            pairs = map(slots.copy_nodes, dict.fromkeys((part[0], keys[0])))
            holders = next((pair for pair in pairs if place in pair), None)
            if holders is not None:
                yield keys, holders

    def _target(self, key: BlockKey, source: int, holders: Sequence[int]) -> int | None:
        """The node that a block's copy goes to."""
        children = self._children.all
        others = [at for at in holders if at != source and children[at].takes_copies]
        if self._children.slots:
            return next(iter(others), None)
        others = self._elsewhere(source, others)
        return copy_node(key, [(at, children[at].name, children[at].read_bytes_per_s) for at in others])

    def _elsewhere(self, number: int, others: list[int]) -> list[int]:
        """Those of the other nodes that are on other hosts; all of them where there is none: hosts fail as a whole."""
        children = self._children.all
        host = parse_address(children[number].name)[0]
        return [at for at in others if parse_address(children[at].name)[0] != host] or others
