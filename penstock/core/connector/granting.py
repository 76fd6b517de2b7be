"""Pages that the host granted for loads: the load that owns each, until nothing is written to it and the host knows.

Invariants, checked by `check_integrity`:
  GRANT-1 A block has pages of at most one request at a time; other requests that need it wait for that load.
  GRANT-2 A granted page is unsettled exactly as long as a load holds it; nothing is written to it afterwards.
  GRANT-3 Every grant ends in exactly one `Landed`, not before its last page is settled.
Verification: tests/core/connector/test_connector_histories.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from penstock.core.connector.pages import ConnectorPages
from penstock.core.connector.records import ConnectorRequest, Grant, Landed
from penstock.core.engine.request import Request, State
from penstock.core.keys import BlockKey

GRANT_SHARE = 0.75  # of the host's pages that loads may hold together; a load alone may hold more


class Granting:
    """Grants under way, of `host_pages` in all."""

    def __init__(self, pages: ConnectorPages, host_pages: int) -> None:
        self._pages = pages
        self._limit = max(1, int(host_pages * GRANT_SHARE))
        self._granted: dict[BlockKey, ConnectorRequest] = {}  # until the host took note
        self._begins: Counter[int] = Counter()  # at which blocks of their prefixes grants begin
        self._of_page: dict[int, ConnectorRequest] = {}  # until it is settled
        self._landed: list[Landed] = []

    def __len__(self) -> int:
        """Blocks that have pages."""
        return len(self._granted)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._granted

    def any_of(self, request: Request, first: int, end: int) -> bool:
        """Whether any of the request's blocks from `first` up to `end` has a page for another's load. What a grant and
        the request have in common begins where the later of both does: a block's key names all blocks before it. O(1)
        for each block that grants begin at."""
        begins = (begin for begin in self._begins if first < begin < end)
        return bool(self._granted) and any(request.key_at(index) in self._granted for index in (first, *begins))

    def has_room(self, blocks: int) -> bool:
        """Whether so many blocks more may get pages."""
        return not self._granted or len(self._granted) + blocks <= self._limit

    def begin(self, entry: ConnectorRequest, first: int, end: int) -> Grant:
        """The host gave pages for these blocks; `add` says which of them are loaded."""
        assert entry.grant is None and not entry.leaving
        entry.grant = Grant(first, end, [entry.request.key_at(index) for index in range(first, end)])
        return entry.grant

    def add(self, entry: ConnectorRequest, index: int, page: int) -> None:
        """A load of the next block, `index`, writes to `page` from now on."""
        assert entry.grant is not None
        if index == entry.grant.first:
            self._begins[index] += 1
        self._granted[entry.request.key_at(index)] = entry
        self._of_page[page] = entry
        entry.grant.unsettled.add(page)

    def settle(self) -> None:
        """Note pages that are no longer written to; a grant lands with its last one."""
        settled, self._pages.settled = self._pages.settled, []
        for page in settled:
            entry = self._of_page.pop(page)
            assert entry.grant is not None
            entry.grant.unsettled.remove(page)
            self.land(entry)

    def land(self, entry: ConnectorRequest) -> None:
        """A grant without unsettled pages ends."""
        grant = entry.grant
        if grant is not None and not grant.unsettled and not grant.landed:
            grant.landed = True
            self._landed.append(Landed(entry.request.request_id, grant.hole))

    def take_landed(self) -> list[Landed]:
        """Grants that ended since the last call."""
        landed, self._landed = self._landed, []
        return landed

    def spoil(self, entries: Sequence[ConnectorRequest]) -> None:
        """The blocks that these requests were granted pages for are of no use any more: their loads end, and `Landed`
        says that none arrived."""
        for entry in entries:
            if entry.grant is not None:
                entry.grant.hole = entry.grant.first
        holes = {entry.request.request_id: entry.grant.first for entry in entries if entry.grant is not None}
        self._landed = [Landed(one.request_id, holes.get(one.request_id, one.hole)) for one in self._landed]

    def end(self, entry: ConnectorRequest) -> None:
        """The host took note of `Landed`; its own cache answers for those blocks from now on."""
        assert entry.grant is not None and entry.grant.landed
        for index, key in enumerate(entry.grant.keys, entry.grant.first):
            if self._granted.get(key) is not entry:
                break  # it and those behind it were another's, or no hits any more
            del self._granted[key]
            if index == entry.grant.first:
                self._begins.subtract((index,))
        self._begins = +self._begins
        entry.grant = None

    def check_integrity(self, entries: Iterable[ConnectorRequest], pages_of_loads: set[int]) -> None:
        """Assert the invariants of the module. O(everything)."""
        granted = [(entry, entry.grant) for entry in entries if entry.grant is not None]
        pages: list[int] = []
        for entry, grant in granted:
            pages += grant.unsettled
            assert all(self._of_page[page] is entry for page in grant.unsettled), "GRANT-2"
            assert grant.landed or grant.unsettled, "GRANT-3: a grant without pages has not landed"
            assert not (grant.landed and grant.unsettled), "GRANT-3: landed with pages under way"
            assert entry.request.state in (State.PREFILL, State.DECODE, State.HANDOFF, State.DONE)
        assert len(set(pages)) == len(pages) == len(self._of_page), "GRANT-2: a page has two owners"
        assert pages_of_loads == set(pages), "GRANT-2: unsettled pages are those that loads hold"
        begins = Counter(grant.first for entry, grant in granted if self._granted.get(grant.keys[0]) is entry)
        assert begins == self._begins, "grants begin elsewhere"
        keys = {id(entry): set(grant.keys) for entry, grant in granted}
        assert all(key in keys.get(id(entry), ()) for key, entry in self._granted.items()), "GRANT-1"
