"""Which tenants without a quota by name have the default quota: as many as the pool has room for.

A client that makes up tenants gets no more room: a further tenant has no default quota until another one loses it. The
first tenants get one; later it passes from tenants whose blocks are not used to tenants whose blocks are used again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

UNUSED_POOL_SIZES = 1  # of new blocks; then a tenant without a reused block may lose its place
IDLE_POOL_SIZES = 8  # the same since the last use, for a tenant whose blocks were used again before


class QuotaPlaces:
    """At most `places_max` tenants, each with the bytes that had been written when it was last used. O(1) each.

    PLACES-1  No tenant has two places.
    PLACES-2  There are at most `places_max`.
    Verification: tests/core/pool/test_quota_places.py.
    """

    def __init__(self) -> None:
        self.places_max = 0
        self.pool_bytes: int | None = None  # what one pool size is; None: places are never lost
        self._written = 0  # bytes of new blocks of all tenants
        self._unproven: OrderedDict[bytes, int] = OrderedDict()  # without a reused block, oldest first
        self._proven: OrderedDict[bytes, int] = OrderedDict()  # with reused blocks, least recently used first

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
        """The tenant that loses its place to one whose blocks are used, if any."""
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
        """Tenants that lose their place when there are fewer: first the latest ones without a reuse."""
        order = [*reversed(self._unproven), *self._proven]
        return order[: max(0, len(self) - self.places_max)]

    def check_integrity(self) -> None:
        """Assert PLACES-1 and PLACES-2."""
        assert not self._proven.keys() & self._unproven.keys(), "PLACES-1: a tenant has two places"
        assert len(self) <= max(0, self.places_max), "PLACES-2: more places are taken than there are"
