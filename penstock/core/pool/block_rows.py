"""The blocks of a pool as rows of packed columns: keys, parents, and all state per block, found by key."""

from __future__ import annotations

import struct

from penstock.core.keys import KEY_BYTES, BlockKey
from penstock.core.pool.columns import ROWS_MIN, Column, HashChains, mixed
from penstock.core.pool.quota import SHARED

PRESENT, PINNED, PAID_SHARED, WRITTEN_HERE, WITH_MAC, USED, LEAVING = 1, 2, 4, 8, 16, 32, 64  # flags of a row
USES_COUNTED_MAX = 65535
MAC_WORDS = 4
_KEY = struct.Struct("<QQ")
_COLUMNS = {
    "keys": ("Q", 2),
    "checksum": ("Q", 1),
    "worth": ("d", 1),
    "tenant": ("I", 1),  # number of a tenant
    "rebuild_s": ("f", 1),
    "page": ("Q", 1),  # where the extent begins, in units of the alignment
    "size": ("I", 1),
    "parent": ("i", 1),  # row; -1 where the row has no block
    "children": ("I", 1),  # present ones of the same tenant
    "ticket": ("I", 1),  # names the row's item in a heap of leaves; 0 without one
    "uses": ("H", 1),
    "position": ("H", 1),
    "member": ("H", 1),
    "flags": ("B", 1),
}


class BlockRows:
    """Rows of blocks. A row without a block stands for the parent of others that is absent (or has another tenant), as
    long as it has children. Not thread-safe.

    ROWS-1  Statement: At most one row of a key is present; at most one row has a given key and tenant.
    ROWS-2  Statement: `children` is the number of present rows whose parent is this row. A row that is neither present
            nor has children is free.
    Verification: `check_integrity`, tests/core/pool/test_pool_eviction.py, tests/pool/local/test_table_histories.py.
    """

    keys: memoryview
    checksum: memoryview
    worth: memoryview[float]
    tenant: memoryview
    rebuild_s: memoryview[float]
    page: memoryview
    size: memoryview
    parent: memoryview
    children: memoryview
    ticket: memoryview
    uses: memoryview
    position: memoryview
    member: memoryview
    flags: memoryview

    def __init__(self, unit_bytes: int, salt: int) -> None:
        """Extents are multiples of `unit_bytes`. `salt` (64 bits) is secret, so that nobody makes long chains."""
        self.unit_bytes = unit_bytes
        self.capacity = ROWS_MIN
        self.high = 0  # rows from here on were never used
        self.blocks = 0  # present rows
        self.salt = salt | 1
        self.columns = {name: Column(code, ROWS_MIN, width) for name, (code, width) in _COLUMNS.items()}
        self.macs: Column | None = None  # made for the first block with a MAC
        self.by_key = HashChains(ROWS_MIN, self.key_hash)
        self._free = 0  # row + 1, linked by `parent`
        self._tenants = [b""]
        self._tenant_rows = [1]
        self._tenant_numbers = {b"": 0}
        self._tenants_free: list[int] = []
        self._view()

    @property
    def row_bytes(self) -> int:
        """Bytes per row, with its link and a bucket."""
        macs = [self.macs] if self.macs is not None else []
        return sum(column.row_bytes for column in (*self.columns.values(), *macs, *self.by_key.columns))

    # --- what a row says ---

    def key(self, row: int) -> BlockKey:
        """The key of a row."""
        return self.raw_keys[16 * row : 16 * row + 16].tobytes()

    def parent_key(self, row: int) -> BlockKey:
        """The key of the block before that of a present row."""
        return self.key(self.parent[row])

    def tenant_of(self, row: int) -> bytes:
        """The tag of the block's tenant."""
        return self._tenants[self.tenant[row]]

    def tenant_name(self, number: int) -> bytes:
        """The tag of a tenant by its number."""
        return self._tenants[number]

    def account(self, row: int) -> bytes:
        """The account that is charged with the block: its tenant's, or the shared one."""
        return SHARED if self.flags[row] & PAID_SHARED else self._tenants[self.tenant[row]]

    def extent_bytes(self, row: int) -> int:
        """Bytes that the block takes on its member."""
        return -(-self.size[row] // self.unit_bytes) * self.unit_bytes

    def mac(self, row: int) -> bytes:
        """The MAC of the block; empty without one."""
        if not self.flags[row] & WITH_MAC:
            return b""
        assert self.macs is not None
        return self.macs.raw[32 * row : 32 * row + 32].tobytes()

    def set_mac(self, row: int, mac: bytes) -> None:
        """Set or remove the MAC of a block."""
        if not mac:
            self.flags[row] &= ~WITH_MAC
            return
        if self.macs is None:
            self.macs = Column("Q", self.capacity, MAC_WORDS)
        self.macs.raw[32 * row : 32 * row + 32] = mac
        self.flags[row] |= WITH_MAC

    def key_hash(self, row: int) -> int:
        """The hash of the row's key."""
        return mixed(self.keys[2 * row], self.keys[2 * row + 1], self.salt)

    # --- rows by key ---

    def find(self, key: BlockKey) -> int:
        """The row of the present block with this key; -1 for a miss."""
        low, high = _KEY.unpack(key)
        chains, keys = self.by_key, self.keys
        link = chains.heads[chains.bucket(mixed(low, high, self.salt))]
        while link:
            row = link - 1
            if keys[2 * row] == low and keys[2 * row + 1] == high and self.flags[row] & PRESENT:
                return row
            link = chains.next[row]
        return -1

    def chain(self, keys: bytes, searches_max: int) -> list[int] | None:
        """Rows of consecutive blocks of a prefix (16 bytes a key): the last one is searched, those before it are its
        parents, as long as these are present; then the next is searched. Each is the row of its key or of another one:
        the caller compares them. None where a search is a miss, or `searches_max` were not enough."""
        flags, parent = self.flags, self.parent
        left = len(keys) // 16
        found = [0] * left
        for _ in range(searches_max):
            row = self.find(keys[16 * left - 16 : 16 * left])
            if row < 0:
                return None
            while left and flags[row] & PRESENT:
                left -= 1
                found[left] = row
                row = parent[row]
            if not left:
                return found
        return None

    def node(self, key: BlockKey, tenant: bytes) -> int:
        """The row with this key and tenant, made where there is none (without a block)."""
        low, high = _KEY.unpack(key)
        hashed = mixed(low, high, self.salt)
        chains, keys = self.by_key, self.keys
        number = self._tenant_numbers.get(tenant, -1)
        link = chains.heads[chains.bucket(hashed)]
        while link:
            row = link - 1
            if keys[2 * row] == low and keys[2 * row + 1] == high and self.tenant[row] == number:
                return row
            link = chains.next[row]
        row = self.take()
        self.keys[2 * row], self.keys[2 * row + 1] = low, high
        self.tenant[row] = self.tenant_number(tenant, 1)
        chains.add(row, hashed)
        return row

    def release(self, row: int) -> None:
        """Free a row that has neither a block nor children; any other is left alone."""
        if self.flags[row] & PRESENT or self.children[row]:
            return
        self.by_key.remove(row, self.key_hash(row))
        self._forget_tenant(self.tenant[row])
        self.parent[row], self._free = self._free, row + 1

    def take(self) -> int:
        """A free row: without flags, children and ticket."""
        if self._free:
            row = self._free - 1
            self._free = self.parent[row]
        else:
            self.make_room(1)
            row = self.high
            self.high += 1
        self.flags[row] = self.ticket[row] = self.children[row] = 0
        self.parent[row] = -1
        return row

    def take_many(self, count: int) -> list[int]:
        """Several free rows, as by `take`; there must be as many."""
        taken, parent, free = [], self.parent, self._free
        flags, ticket, children = self.flags, self.ticket, self.children
        for _ in range(count):
            row = free - 1
            free = parent[row]
            flags[row] = ticket[row] = children[row] = 0
            taken.append(row)
        self._free = free
        return taken

    def free_many(self, freed: list[int]) -> None:
        """Free rows without a block, children and ticket, which are in no chain any more."""
        parent, free, counts = self.parent, self._free, dict[int, int]()
        for row in freed:
            parent[row], free = free, row + 1
            number = self.tenant[row]
            counts[number] = counts.get(number, 0) + 1
        self._free = free
        for number, count in counts.items():
            self._forget_tenant(number, count)

    def take_range(self, count: int) -> int:
        """The first of `count` rows in a range that was never used."""
        self.make_room(count)
        first = self.high
        self.high += count
        return first

    def make_room(self, count: int) -> None:
        """Grow for `count` more rows than were ever used."""
        if self.high + count <= self.capacity:
            return
        self.worth_bits.release()
        capacity = self.capacity
        while capacity < self.high + count:
            capacity *= 2
        try:
            for column in (*self.columns.values(), *([self.macs] if self.macs else [])):
                column.grow(capacity)
            self.by_key.grow(capacity)
            self.capacity = capacity
        finally:
            self._view()

    def tenant_number(self, tenant: bytes, rows: int) -> int:
        """The number of a tenant that gets so many more rows."""
        number = self._tenant_numbers.get(tenant)
        if number is None:
            if self._tenants_free:
                number = self._tenants_free.pop()
                self._tenants[number], self._tenant_rows[number] = tenant, 0
            else:
                number = len(self._tenants)
                self._tenants.append(tenant)
                self._tenant_rows.append(0)
            self._tenant_numbers[tenant] = number
        self._tenant_rows[number] += rows
        return number

    def check_integrity(self) -> None:
        """Assert ROWS-1 and ROWS-2; O(n)."""
        free, link = set(), self._free
        while link:
            free.add(link - 1)
            link = self.parent[link - 1]
        used = set(range(self.high)) - free
        self.by_key.check_integrity(used)
        children = dict.fromkeys(used, 0)
        tenants: dict[int, int] = {0: 1}
        names, present = set(), set()
        for row in used:
            tenants[self.tenant[row]] = tenants.get(self.tenant[row], 0) + 1
            names.add((self.key(row), self.tenant[row]))
            if self.flags[row] & PRESENT:
                assert self.parent[row] in used and self.tenant[self.parent[row]] == self.tenant[row], "ROWS-2: parent"
                children[self.parent[row]] += 1
                present.add(self.key(row))
        assert len(names) == len(used), "ROWS-1: two rows have one key and tenant"
        assert len(present) == self.blocks == sum(bool(self.flags[row] & PRESENT) for row in used), "ROWS-1"
        for row, count in children.items():
            assert self.children[row] == count, "ROWS-2: children are miscounted"
            assert count or self.flags[row] & PRESENT, "ROWS-2: a row without a block or children is not free"
        assert all(tenants.get(n, 0) == count for n, count in enumerate(self._tenant_rows)), "tenants are miscounted"

    # --- inside ---

    def _forget_tenant(self, number: int, rows: int = 1) -> None:
        self._tenant_rows[number] -= rows
        if not self._tenant_rows[number]:
            del self._tenant_numbers[self._tenants[number]]
            self._tenants_free.append(number)

    def _view(self) -> None:
        for name, column in self.columns.items():
            setattr(self, name, column.items)
        self.raw_keys = self.columns["keys"].raw
        self.worth_bits = self.columns["worth"].raw.cast("Q")  # of a worth of at least 0: these have its order


assert _KEY.size == KEY_BYTES
