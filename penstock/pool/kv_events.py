"""KV events: what the pool holds, as vLLM tells it to routers and indexers (`vllm.distributed.kv_events`).

EVT-1  A block is announced after the one before it: a reader that hangs blocks into a tree knows the parent.
EVT-2  A block is removed under the medium it was announced with, and never before it was announced.
EVT-3  Everything is bounded: what waits to be taken, what is announced, what waits for its parent. Where something does
       not fit it is counted, and readers are told that all blocks are gone, after which they learn anew.
Verification: tests/pool/test_kv_events.py.

What happened is noted by any thread, in constant time; `take` makes events of it on the thread of whoever sends them.
Hashes are integers of 64 bits: the last eight bytes of the pool's keys, which separate models, layouts and tenants.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Sequence

import msgspec

from penstock.core.keys import BlockKey
from penstock.core.new_block import NewBlock, prefix_position
from penstock.core.operations import BlockHit

NOTES_MAX = 1 << 16  # that wait to be taken
ANNOUNCED_MAX = 1 << 18  # blocks; about 60 MB
ORPHANS_MAX = 4096  # blocks that wait for their parent
CPU, STORAGE = "CPU", "STORAGE"
LOCAL = "LOCAL"


class _Event(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    pass


class BlockStored(_Event):
    """One block that is there; fields and their order are vLLM's."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[str, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None


class BlockRemoved(_Event):
    """Blocks that are gone."""

    block_hashes: list[int]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None


class AllBlocksCleared(_Event):
    """Everything that was announced is forgotten."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """What one message holds. `ts`: seconds since 1970."""

    ts: float
    events: list[Event]
    data_parallel_rank: int | None = None


class _Stored(msgspec.Struct, frozen=True, gc=False):
    key: BlockKey
    parent: BlockKey | None  # None: the first block of a prompt
    tokens: tuple[int, ...]
    medium: str


_Note = _Stored | BlockKey  # a key alone: that block is gone


def medium_of(route: Sequence[str]) -> str:
    """Where a hit lies (`pool.api.Located`): memory of this process, or anything else."""
    return CPU if len(route) == 1 and route[0].startswith("memory:") and "@" not in route[0] else STORAGE


def hash_of(key: BlockKey) -> int:
    """The block's hash as events name it."""
    return int.from_bytes(key[-8:], "big")


class KvEventLog:
    """Notes by any thread; `take` and `restart` by one."""

    def __init__(
        self,
        notes_max: int = NOTES_MAX,
        announced_max: int = ANNOUNCED_MAX,
        orphans_max: int = ORPHANS_MAX,
        clears: bool = True,
    ) -> None:
        """`clears`: readers hear that all blocks are gone by AllBlocksCleared; False where others publish their blocks
        in the same place: then each block is removed."""
        self.dropped = 0  # notes that found no room
        self.changed = threading.Event()  # there is something to take
        self._notes: deque[_Note] = deque()
        self._lock = threading.Lock()
        self._notes_max, self._announced_max, self._orphans_max = notes_max, announced_max, orphans_max
        self._clears = clears
        self._anew = True  # the next `take` begins with the end of all blocks
        self._announced: OrderedDict[BlockKey, str] = OrderedDict()  # -> medium; the oldest first
        self._orphans: dict[BlockKey, list[_Stored]] = {}  # by parent
        self._orphan_count = 0

    # -- any thread ---------------------------------------------------------------------------------------------

    def stored(self, block: NewBlock, medium: str) -> None:
        """The pool holds the block; nothing where its tokens are not known."""
        if block.tokens:
            first = block.position == prefix_position(block.key, 0)
            self._note(_Stored(block.key, None if first else block.parent, block.tokens, medium))

    def found(
        self, keys: Sequence[BlockKey], hits: Sequence[BlockHit | None], tokens: Sequence[int], block_tokens: int
    ) -> None:
        """The first blocks of a prompt were looked up. Those that were announced and are no hits are gone."""
        for index, (key, hit) in enumerate(zip(keys, hits, strict=True)):
            if hit is None:
                self.gone(key)
            elif key not in self._announced:
                parent, first = keys[index - 1] if index else None, index * block_tokens
                self._note(_Stored(key, parent, tuple(tokens[first : first + block_tokens]), medium_of(hit.route)))

    def gone(self, key: BlockKey) -> None:
        """The pool does not hold the block any more."""
        if key in self._announced or self._notes:  # it may be announced with the next `take`
            self._note(key)

    def _note(self, note: _Note) -> None:
        with self._lock:
            if len(self._notes) >= self._notes_max:
                self.dropped += 1 + len(self._notes)
                self._notes.clear()
                self._anew = True
            else:
                self._notes.append(note)
        self.changed.set()

    # -- who sends ----------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """Readers forget everything; what is stored or found from now on is announced anew."""
        with self._lock:
            self._anew = True
        self.changed.set()

    def take(self, events_max: int) -> list[Event]:
        """Events since the last call, about `events_max` at most; `changed` stays set while there are more."""
        with self._lock:
            events: list[Event] = []
            if self._anew:
                self._anew = False
                self._forget_all(events)
            notes = [self._notes.popleft() for _ in range(min(events_max, len(self._notes)))]
            if not self._notes:
                self.changed.clear()
        for note in notes:
            if isinstance(note, bytes):
                self._remove(note, events)
            else:
                self._store(note, events)
        return events

    def _forget_all(self, events: list[Event]) -> None:
        if self._clears:
            events.append(AllBlocksCleared())
            self._announced.clear()
        for key in list(self._announced):
            self._remove(key, events)
        self._orphans.clear()
        self._orphan_count = 0

    def _store(self, block: _Stored, events: list[Event]) -> None:
        waiting = [block]
        while waiting:
            one = waiting.pop()
            if one.key in self._announced:
                self._announced.move_to_end(one.key)
                continue
            if one.parent is not None and one.parent not in self._announced:
                self._keep_orphan(one.parent, one)
                continue
            events.append(
                BlockStored(
                    [hash_of(one.key)],
                    None if one.parent is None else hash_of(one.parent),
                    list(one.tokens),
                    len(one.tokens),
                    None,
                    one.medium,
                    None,
                    locality=LOCAL,
                )
            )
            self._announced[one.key] = one.medium
            if len(self._announced) > self._announced_max:
                self._remove(next(iter(self._announced)), events)
            adopted = self._orphans.pop(one.key, [])
            self._orphan_count -= len(adopted)
            waiting += adopted

    def _keep_orphan(self, parent: BlockKey, block: _Stored) -> None:
        if self._orphan_count >= self._orphans_max:  # the oldest ones wait in vain
            self._orphan_count -= len(self._orphans.pop(next(iter(self._orphans))))
        self._orphans.setdefault(parent, []).append(block)
        self._orphan_count += 1

    def _remove(self, key: BlockKey, events: list[Event]) -> None:
        medium = self._announced.pop(key, None)
        if medium is not None:
            events.append(BlockRemoved([hash_of(key)], medium, locality=LOCAL))
