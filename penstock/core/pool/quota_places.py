"""Which tenants without a quota of their own have the default one: as many as the pool has room for, not all that come.

Whoever invents tenants invents no room: a further tenant has no default quota until another one gives it up. The first
that come have one; later it passes to those whose blocks are used again from those that nobody asks for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

UNUSED_POOL_SIZES = 1  # of new blocks, after which a tenant none of whose blocks was used again may lose its place
IDLE_POOL_SIZES = 8  # the same since the last use, for a tenant whose blocks were used again before


class QuotaPlaces:
    """At most `places_max` tenants, each with the bytes that had been written when it was last used. O(1) each.

    I1  no tenant has two places
    I2  there are at most `places_max`
    """

    def __init__(self) -> None:
        self.places_max = 0
        self.pool_bytes: int | None = None  # what one pool size is; None: places are never lost
        self._written = 0  # bytes of new blocks of all tenants
        self._unproven: OrderedDict[bytes, int] = OrderedDict()  # none of whose blocks was used again, oldest first
        self._proven: OrderedDict[bytes, int] = OrderedDict()  # the one that was not used for longest first

    def __len__(self) -> int:
        return len(self._unproven) + len(self._proven)

    def __contains__(self, tenant: bytes) -> bool:
        return tenant in self._proven or tenant in self._unproven

    def __iter__(self) -> Iterator[bytes]:
        return iter((*self._proven, *self._unproven))

    @property
    def free(self) -> bool:
        """Whether one more tenant would find a place."""
        return len(self) < self.places_max

    def written(self, size_bytes: int) -> None:
        """Note a new block."""
        self._written += size_bytes

    def take(self, tenant: bytes) -> None:
        """Give a free place to a tenant that has none."""
        assert self.free and tenant not in self
        self._unproven[tenant] = self._written

    def used(self, tenant: bytes) -> bool:
        """Note that a block of a tenant was used again; False when it has no place."""
        if tenant in self._unproven:
            del self._unproven[tenant]
        elif tenant in self._proven:
            self._proven.move_to_end(tenant)
        else:
            return False
        self._proven[tenant] = self._written
        return True

    def idle(self) -> bytes | None:
        """The tenant that must give up its place to one whose blocks are used, if any."""
        if self.pool_bytes is None:
            return None
        for tenants, sizes in ((self._unproven, UNUSED_POOL_SIZES), (self._proven, IDLE_POOL_SIZES)):
            for tenant, since in tenants.items():
                if self._written - since >= sizes * self.pool_bytes:
                    return tenant
                break
        return None

    def give_up(self, tenant: bytes) -> None:
        """A tenant loses its place; one that has none is ignored."""
        self._unproven.pop(tenant, None)
        self._proven.pop(tenant, None)

    def surplus(self) -> list[bytes]:
        """Those that must go when there are fewer places: first the last that came and were never used again."""
        order = [*reversed(self._unproven), *self._proven]
        return order[: max(0, len(self) - self.places_max)]

    def check_integrity(self) -> None:
        """Assert I1 and I2."""
        assert not self._proven.keys() & self._unproven.keys(), "I1: a tenant has two places"
        assert len(self) <= max(0, self.places_max), "I2: more places are taken than there are"
