"""Rows of tables of older formats, one column per value: read when a table is converted, checked or salvaged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import xxhash

from penstock.core.keys import KEY_BYTES, BlockKey
from penstock.core.new_block import BLOCK_BYTES_MAX, MAC_BYTES, REBUILD_S_MAX, TENANT_BYTES
from penstock.core.pool.striping import CYCLE_BLOCKS
from penstock.pool.block import Block
from penstock.pool.members.stored_rows import WORTH_MAX, Stored

OLD_FORMATS = (1, 2, 3)  # converted when a table is opened
Row = tuple[Any, ...]
FORMAT_1_COLUMNS = 7  # no checksums and uses
_FORMAT_2_COLUMNS = 12  # no MAC
_FORMAT_3_COLUMNS = 13


def block_of(row: Row) -> Stored | None:
    """The block that a row describes (`member` is 0; the caller sets it); None for a row that is not valid."""
    if len(row) == FORMAT_1_COLUMNS:
        row = _row_of_format_1(row)
    if len(row) not in (_FORMAT_2_COLUMNS, _FORMAT_3_COLUMNS):
        return None
    *says, row_check, used, uses, use_check = row
    key, parent, offset, size, position, checksum, tenant, rebuild_s = says[:8]
    mac = says[8] if len(row) == _FORMAT_3_COLUMNS else b""
    if row_check != _check(says) or use_check != _check((key, used, uses)):
        return None
    # the checksum has no key: whoever can write the file can forge a row that matches
    if not _is_possible((*says[:8], mac, used, uses)):
        return None
    number = int.from_bytes(checksum, "little")
    return Block(key, parent, 0, offset, size, position % CYCLE_BLOCKS, number, tenant, rebuild_s, uses, mac=mac), used


def _is_possible(values: Row) -> bool:
    """Whether a block that `pool.api.check_write` allows could have such a row."""
    key, parent, offset, size, position, checksum, tenant, rebuild_s, mac, used, uses = values
    names = all(isinstance(one, bytes) for one in (key, parent, checksum, tenant, mac))
    if not names or not all(isinstance(one, int) and one >= 0 for one in (offset, size, position, uses)):
        return False
    if not all(isinstance(one, float) and math.isfinite(one) for one in (rebuild_s, used)):
        return False
    lengths = (len(key), len(parent), len(checksum)) == (KEY_BYTES, KEY_BYTES, 8) and len(tenant) in (0, TENANT_BYTES)
    lengths = lengths and len(mac) in (0, MAC_BYTES)
    return lengths and 1 <= size <= BLOCK_BYTES_MAX and 0 <= rebuild_s <= REBUILD_S_MAX and 0 <= used <= WORTH_MAX


def _use_columns(key: BlockKey, used: float, uses: int) -> Row:
    columns = (key, float(used), int(uses))
    return (*columns[1:], _check(columns))


def _check(columns: Sequence[Any]) -> bytes:
    """Checksum over values and their types."""
    return xxhash.xxh3_64_digest(repr(tuple(columns)).encode())


def _row_of_format_1(row: Row) -> Row:
    """Convert a row of format 1, which had no checksum: its values are accepted unchecked."""
    key, parent, offset, size, position, checksum, used = row
    sizes = (isinstance(key, bytes), isinstance(parent, bytes), isinstance(checksum, bytes), isinstance(used, int))
    numbers = all(isinstance(number, int) for number in (offset, size, position))
    if not (all(sizes) and numbers):
        return ()
    says = (key, parent, offset, size, position, checksum, b"", 0.0, b"")
    return (*says, _check(says), *_use_columns(key, used, 1))
