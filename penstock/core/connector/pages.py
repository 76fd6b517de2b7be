"""L1 of another engine: pages that it granted for loads, and pages that it pins for saves and hand-offs under way."""

from __future__ import annotations

from collections.abc import Iterable

from penstock.core.engine.device_pages import DevicePages
from penstock.core.keys import BlockKey


class ConnectorPages(DevicePages):
    """The driver chooses the numbers of pages; every use of a page has a number of its own. Nothing is taken or evicted
    here.

    `settled` lists pages of loads that nothing is written to any more, `released` pinned pages that nothing is read
    from any more; the reader empties these lists. A key counts as contained while a request says that the host
    holds it (`note`), or while it is being saved."""

    def __init__(self) -> None:
        super().__init__(0)
        self._noted: dict[BlockKey, int] = {}
        self._saving: dict[BlockKey, int] = {}
        self._pins: dict[int, int] = {}
        self._names: dict[int, BlockKey] = {}
        self.settled: list[int] = []
        self.released: list[int] = []

    @property
    def available(self) -> int:
        """0: the engine around it gives pages, nothing is taken here."""
        return 0

    @property
    def cached(self) -> int:
        """Blocks that are being saved."""
        return len(self._saving)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._saving or key in self._noted

    def is_saving(self, key: BlockKey) -> bool:
        """Whether this block is being saved."""
        return key in self._saving

    def is_cached(self, page: int) -> bool:
        """Whether the block of this page is being saved."""
        return page in self._names

    def note(self, keys: Iterable[BlockKey]) -> None:
        """One request reports that the host holds these blocks."""
        for key in keys:
            self._noted[key] = self._noted.get(key, 0) + 1

    def forget(self, keys: Iterable[BlockKey]) -> None:
        """Take one `note` back."""
        for key in keys:
            self._noted[key] -= 1
            if not self._noted[key]:
                del self._noted[key]

    def hold(self, key: BlockKey, page: int) -> None:
        """The host engine pins `page`, which holds the computed block `key`, until it is released; one pin."""
        assert key not in self._saving and page not in self._names
        self._saving[key] = page
        self._names[page] = key
        self._pins[page] = 1

    def pin_page(self, page: int) -> None:
        """One pin more of a page, or its first one: the host pins it until it is released."""
        self._pins[page] = self._pins.get(page, 0) + 1

    def take(self) -> int | None:
        """None: there is no page to be taken."""
        return None

    def give_back(self, page: int) -> None:
        """A load's page is no longer needed here."""
        self.settled.append(page)

    def insert(self, key: BlockKey, parent: BlockKey, page: int, pins: int) -> None:
        """A load's page is filled: it is the engine's from now on."""
        self.settled.append(page)

    def pin(self, key: BlockKey) -> int:
        """Hold the page of a block that is being saved; its number."""
        page = self._saving[key]
        self._pins[page] += 1
        return page

    def page_of(self, key: BlockKey) -> int:
        """The page of a block that is being saved. Raises KeyError for any other."""
        return self._saving[key]

    def unpin(self, page: int) -> None:
        """Let go of a page once; after the last time it is released to the engine."""
        self._pins[page] -= 1
        if not self._pins[page]:
            del self._pins[page]
            if (key := self._names.pop(page, None)) is not None:
                del self._saving[key]
            self.released.append(page)

    def check_integrity(self, private: set[int], reserved: set[BlockKey]) -> None:
        """Assert that names and pins are of the same pages, each pinned at least once."""
        assert set(self._names) == set(self._saving.values()) <= set(self._pins)
        assert all(count > 0 for count in self._pins.values())
        assert all(count > 0 for count in self._noted.values())
