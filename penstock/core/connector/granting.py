"""Pages that the host gave for loads: whose each is, until nothing is written to it any more and the host took note.

Invariants, checked by `check_integrity`:
  G1 a block is granted pages of at most one request at a time; whoever else needs it waits for that load;
  G2 a granted page is unsettled exactly as long as a load holds it, and nothing is written to it afterwards;
  G3 every grant ends in exactly one `Landed`, not before its last page is settled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from penstock.core.connector.pages import GuestPages
from penstock.core.connector.records import Grant, Guest, Landed
from penstock.core.engine.request import Request, State
from penstock.core.keys import BlockKey

GRANT_SHARE = 0.75  # of the host's pages that loads may hold together; a load alone may hold more


class Granting:
    """Grants under way, of `host_pages` in all."""

    def __init__(self, pages: GuestPages, host_pages: int) -> None:
        self._pages = pages
        self._limit = max(1, int(host_pages * GRANT_SHARE))
        self._granted: dict[BlockKey, Guest] = {}  # until the host took note
        self._begins: Counter[int] = Counter()  # at which blocks of their prefixes grants begin
        self._of_page: dict[int, Guest] = {}  # until it is settled
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

    def begin(self, guest: Guest, first: int, end: int) -> Grant:
        """The host gave pages for these blocks; `add` says which of them are loaded."""
        assert guest.grant is None and not guest.leaving
        guest.grant = Grant(first, end, [guest.request.key_at(index) for index in range(first, end)])
        return guest.grant

    def add(self, guest: Guest, index: int, page: int) -> None:
        """A load of the next block, `index`, writes to `page` from now on."""
        assert guest.grant is not None
        if index == guest.grant.first:
            self._begins[index] += 1
        self._granted[guest.request.key_at(index)] = guest
        self._of_page[page] = guest
        guest.grant.unsettled.add(page)

    def settle(self) -> None:
        """Grants whose last page nothing is written to any more have landed."""
        settled, self._pages.settled = self._pages.settled, []
        for page in settled:
            guest = self._of_page.pop(page)
            assert guest.grant is not None
            guest.grant.unsettled.remove(page)
            self.land(guest)

    def land(self, guest: Guest) -> None:
        """A grant without unsettled pages ends."""
        grant = guest.grant
        if grant is not None and not grant.unsettled and not grant.landed:
            grant.landed = True
            self._landed.append(Landed(guest.request.request_id, grant.hole))

    def take_landed(self) -> list[Landed]:
        """Grants that ended since the last call."""
        landed, self._landed = self._landed, []
        return landed

    def spoil(self, guests: Sequence[Guest]) -> None:
        """The blocks that these requests were granted pages for are of no use any more: their loads end, and `Landed`
        says that none arrived."""
        for guest in guests:
            if guest.grant is not None:
                guest.grant.hole = guest.grant.first
        holes = {guest.request.request_id: guest.grant.first for guest in guests if guest.grant is not None}
        self._landed = [Landed(one.request_id, holes.get(one.request_id, one.hole)) for one in self._landed]

    def end(self, guest: Guest) -> None:
        """The host took note of `Landed`; its own cache answers for those blocks from now on."""
        assert guest.grant is not None and guest.grant.landed
        for index, key in enumerate(guest.grant.keys, guest.grant.first):
            if self._granted.get(key) is not guest:
                break  # it and those behind it were another's, or no hits any more
            del self._granted[key]
            if index == guest.grant.first:
                self._begins.subtract((index,))
        self._begins = +self._begins
        guest.grant = None

    def check_integrity(self, guests: Iterable[Guest], pages_of_loads: set[int]) -> None:
        """Assert the invariants of the module. O(everything)."""
        granted = [(guest, guest.grant) for guest in guests if guest.grant is not None]
        pages: list[int] = []
        for guest, grant in granted:
            pages += grant.unsettled
            assert all(self._of_page[page] is guest for page in grant.unsettled), "G2"
            assert grant.landed or grant.unsettled, "G3: a grant without pages has not landed"
            assert not (grant.landed and grant.unsettled), "G3: landed with pages under way"
            assert guest.request.state in (State.PREFILL, State.DECODE, State.DONE)
        assert len(set(pages)) == len(pages) == len(self._of_page), "G2: a page has two owners"
        assert pages_of_loads == set(pages), "G2: unsettled pages are those that loads hold"
        begins = Counter(grant.first for guest, grant in granted if self._granted.get(grant.keys[0]) is guest)
        assert begins == self._begins, "grants begin elsewhere"
        keys = {id(guest): set(grant.keys) for guest, grant in granted}
        assert all(key in keys.get(id(guest), ()) for key, guest in self._granted.items()), "G1"
