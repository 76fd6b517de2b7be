"""What one request still has to load, block by block, and the pages of L1 for its blocks.

Only the methods of `RequestLoads` change it, so that counts, bytes and queues of blocks always agree with the loads.

Invariants, checked by `check_integrity`:
  LOADS-1 `counts`, `wanted` and `staged` are those of the loads;
  LOADS-2 once the loads were counted (`count`), `bytes_by_route` and `upload_bytes` are their sums;
  LOADS-3 a block that is ready has a page, and is not being loaded.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING

from penstock.core.keys import BlockKey
from penstock.core.operations import BlockHit, Route

if TYPE_CHECKING:
    from penstock.core.engine.request import Request

NO_PAGE = -1


class LoadState(Enum):
    """A block on its way up: WANTED, FETCHING (L3 -> L2), STAGED (in L2), UPLOADING (L2 -> L1)."""

    WANTED = "wanted"
    FETCHING = "fetching"
    STAGED = "staged"
    UPLOADING = "uploading"

    __hash__ = object.__hash__  # Enum's own is computed in Python, for every change of a load


TO_FETCH = (LoadState.WANTED, LoadState.FETCHING)  # bytes that are not in L2 yet


class BlockLoad:
    """One block on its way to L1, shared by every request that waits for it (`waiters`: request -> block index)."""

    __slots__ = (
        "hit",
        "issued_s",
        "key",
        "page",
        "parent",
        "reactive",
        "retained",
        "slot",
        "state",
        "upload_op",
        "waiters",
    )

    def __init__(self, key: BlockKey, parent: BlockKey, hit: BlockHit) -> None:
        self.key = key
        self.parent = parent
        self.hit = hit
        self.state = LoadState.WANTED
        self.slot: int | None = None
        self.retained = False  # the driver leaves the slot's content in place until a Drop
        self.reactive = False  # fetched before any request that waits for it was admitted
        self.page: int | None = None
        self.upload_op: int | None = None
        self.issued_s = 0.0
        self.waiters: dict[Request, int] = {}


class RequestLoads:
    """Loads by block index (`by_index`), and what follows from them.

    `bytes_by_route` are still to be fetched, `upload_bytes` still to be uploaded: an estimate by the hits until the
    request is admitted. `wanted` has the loads that may be fetched, by route, and `staged` those that may be uploaded,
    each in the order in which they came. `pages[i]` is the page of block i, or NO_PAGE; `ready[i]` says whether its KV
    is there. Batches read `pages` itself: one list from admission to the end."""

    __slots__ = ("by_index", "bytes_by_route", "counts", "pages", "ready", "staged", "upload_bytes", "wanted")

    def __init__(self) -> None:
        self.bytes_by_route: dict[Route, int] = {}
        self.upload_bytes = 0
        self.clear()

    def clear(self) -> None:
        """Nothing is loaded or in L1. The bytes stay as they are until the next `estimate`."""
        self.by_index: dict[int, BlockLoad] = {}
        self.counts = dict.fromkeys(LoadState, 0)
        self.wanted: dict[Route, OrderedDict[BlockLoad, None]] = {}
        self.staged: OrderedDict[BlockLoad, None] = OrderedDict()
        self.begin(0)

    def __contains__(self, index: int) -> bool:
        return index in self.by_index

    def __len__(self) -> int:
        return len(self.by_index)

    # -- what is to be loaded -----------------------------------------------------------------------------------

    def estimate(self, bytes_by_route: dict[Route, int]) -> None:
        """Set what is to be fetched, and then uploaded, as the hits say."""
        self.bytes_by_route, self.upload_bytes = bytes_by_route, sum(bytes_by_route.values())

    def count(self) -> None:
        """Set what is to be fetched and uploaded, as the loads say."""
        self.bytes_by_route, self.upload_bytes = self._sums()

    def _sums(self) -> tuple[dict[Route, int], int]:
        by_route: dict[Route, int] = {}
        for load in self.by_index.values():
            if load.state in TO_FETCH:
                by_route[load.hit.route] = by_route.get(load.hit.route, 0) + load.hit.size_bytes
        return by_route, sum(load.hit.size_bytes for load in self.by_index.values())

    def add(self, index: int, load: BlockLoad) -> None:
        """Block `index` is loaded from now on; its bytes were estimated, or will be counted."""
        self.by_index[index] = load
        self._enter(load, load.state, load.hit.route)

    def remove(self, index: int) -> BlockLoad:
        """Block `index` is not loaded any more: it failed or is not needed."""
        load = self.by_index.pop(index)
        self._leave(load)
        self.upload_bytes -= load.hit.size_bytes
        if load.state in TO_FETCH:
            self._add_bytes(load.hit.route, -load.hit.size_bytes)
        return load

    def move(self, load: BlockLoad, state: LoadState, hit: BlockHit) -> None:
        """One of the loads is about to change its state, and its hit where it is fetched from elsewhere."""
        self._leave(load)
        self._enter(load, state, hit.route)
        before, after = load.state in TO_FETCH, state in TO_FETCH
        if before and (not after or hit is not load.hit):
            self._add_bytes(load.hit.route, -load.hit.size_bytes)
        if after and (not before or hit is not load.hit):
            self._add_bytes(hit.route, load.hit.size_bytes)

    def advance(self, loads: Sequence[BlockLoad], state: LoadState) -> None:
        """Some of the loads, of one size and in one state, and over one route if they are not in L2 yet, are about to
        reach a later state."""
        before, count = loads[0].state, len(loads)
        self.counts[before] -= count
        self.counts[state] += count
        if before is LoadState.WANTED:
            wanted = self.wanted[loads[0].hit.route]
            for load in loads:
                del wanted[load]
        elif before is LoadState.STAGED:
            for load in loads:
                del self.staged[load]
        if state is LoadState.STAGED:
            self.staged.update(dict.fromkeys(loads))
        if before in TO_FETCH and state not in TO_FETCH:
            self._add_bytes(loads[0].hit.route, -count * loads[0].hit.size_bytes)

    def uploaded(self, indexes: Sequence[int], ready: bool) -> None:
        """Blocks that were UPLOADING are not loaded any more; `ready`: they have pages, with their KV now."""
        self.counts[LoadState.UPLOADING] -= len(indexes)
        for index in indexes:
            self.upload_bytes -= self.by_index.pop(index).hit.size_bytes
            if ready:
                self.ready[index] = True

    def _enter(self, load: BlockLoad, state: LoadState, route: Route) -> None:
        self.counts[state] += 1
        if state is LoadState.WANTED:
            self.wanted.setdefault(route, OrderedDict())[load] = None
        elif state is LoadState.STAGED:
            self.staged[load] = None

    def _leave(self, load: BlockLoad) -> None:
        self.counts[load.state] -= 1
        if load.state is LoadState.WANTED:
            del self.wanted[load.hit.route][load]
        elif load.state is LoadState.STAGED:
            del self.staged[load]

    def _add_bytes(self, route: Route, size_bytes: int) -> None:
        self.bytes_by_route[route] = self.bytes_by_route.get(route, 0) + size_bytes

    # -- pages --------------------------------------------------------------------------------------------------

    def begin(self, blocks: int) -> None:
        """A new list of pages, for so many blocks; none has one."""
        self.pages = [NO_PAGE] * blocks
        self.ready = [False] * blocks

    def set_page(self, index: int, page: int, ready: bool = False) -> None:
        """Block `index`, at most one behind the last, has this page; `ready`: its KV is there."""
        if index == len(self.pages):
            self.pages.append(page)
            self.ready.append(ready)
        else:
            self.pages[index], self.ready[index] = page, ready

    def fill(self, index: int) -> None:
        """The KV of block `index` is in its page."""
        self.ready[index] = True

    def is_ready(self, index: int) -> bool:
        """Whether the KV of a block is in L1."""
        return index < len(self.ready) and self.ready[index]

    def check_integrity(self, counted: bool) -> None:
        """Assert the invariants of the module; `counted`: `count` was called since the last `estimate`."""
        assert +Counter(self.counts) == Counter(load.state for load in self.by_index.values()), "LOADS-1: counts"
        wanted = {(load, route) for route, loads in self.wanted.items() for load in loads}
        states = [(load, load.state) for load in self.by_index.values()]
        assert wanted == {(load, load.hit.route) for load, state in states if state is LoadState.WANTED}, "LOADS-1"
        assert set(self.staged) == {load for load, state in states if state is LoadState.STAGED}, "LOADS-1"
        if counted:
            by_route, upload_bytes = self._sums()
            assert {route: size for route, size in self.bytes_by_route.items() if size} == by_route, "LOADS-2"
            assert self.upload_bytes == upload_bytes, "LOADS-2"
        assert len(self.pages) == len(self.ready)
        for index, (page, ready) in enumerate(zip(self.pages, self.ready, strict=True)):
            assert not ready or (page != NO_PAGE and index not in self.by_index), "LOADS-3"
