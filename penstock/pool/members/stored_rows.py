"""A block's row as packed bytes, as a durable table stores it and the table of a pool takes it in: many at a time.

ROW-1  Statement: A row is valid only if both of its checks match: over what never changes, and over its last use, each
       with the key.
Verification: tests/pool/members/test_journal_rows.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from penstock.core.keys import BlockKey
from penstock.core.layout import STAGING_ALIGNMENT_BYTES
from penstock.core.new_block import BLOCK_BYTES_MAX, MAC_BYTES, REBUILD_S_MAX, TENANT_BYTES
from penstock.core.pool.block_rows import USES_COUNTED_MAX
from penstock.core.pool.copies import copy_of, is_copy, original_of
from penstock.core.pool.striping import CYCLE_BLOCKS
from penstock.pool.block import Block

WORTH_MAX = 1e20  # above format 1's nanoseconds; a larger value would raise those of all later blocks
ROW = np.dtype(
    [
        ("key", "<u8", 2),
        ("parent", "<u8", 2),
        ("offset", "<u8"),
        ("checksum", "<u8"),
        ("rebuild_s", "<f8"),
        ("size", "<u4"),
        ("position", "<u2"),
        ("tenant_bytes", "u1"),
        ("mac_bytes", "u1"),
        ("tenant", "<u8"),
        ("mac", "<u8", MAC_BYTES // 8),
        ("row_check", "<u8"),
        ("worth", "<f8"),
        ("uses", "<u8"),
        ("use_check", "<u8"),
    ]
)
KEY_END, ROW_END = ROW.fields["parent"][1], ROW.fields["worth"][1]  # type: ignore[index]
StoredRows = NDArray[np.void]
Stored = tuple[Block, float]  # a block and its last use
Use = tuple[BlockKey, float, int]  # a key, its last use, how often it was used
COPY = 128  # in `tenant_bytes`: the block is a copy
REFUSED = (ArithmeticError, ValueError, TypeError, AttributeError)  # what values that no block has raise in `packed`
_ROW_SEED, _USE_SEED = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def packed(rows: Sequence[Stored]) -> StoredRows:
    """Blocks and their eviction values as packed rows with their checks. Raises one of `REFUSED` for values that a row
    cannot have."""
    made = unchecked([block for block, _ in rows])
    made["worth"] = [worth for _, worth in rows]
    made["row_check"], made["use_check"] = row_checks(made), use_checks(made)
    return made


def unchecked(blocks: Sequence[Block]) -> StoredRows:
    """Blocks as packed rows without eviction values and checks. Raises as `packed`."""
    made = np.zeros(len(blocks), ROW)
    made["key"] = _words([block.key for block in blocks], KEY_END)
    made["parent"] = _words([block.parent for block in blocks], KEY_END)
    made["offset"] = [block.offset for block in blocks]
    made["checksum"] = [block.checksum for block in blocks]
    made["rebuild_s"] = [block.rebuild_s for block in blocks]
    made["size"] = [block.size_bytes for block in blocks]
    made["position"] = [block.position for block in blocks]
    made["uses"] = [block.uses for block in blocks]
    if any(block.tenant != b"" for block in blocks):
        tenants = [original_of(block.tenant) for block in blocks]
        made["tenant_bytes"] = [
            len(tenant) | COPY * is_copy(block.tenant) for block, tenant in zip(blocks, tenants, strict=True)
        ]
        made["tenant"] = _words([tenant.ljust(TENANT_BYTES, b"\0") for tenant in tenants], TENANT_BYTES)[:, 0]
    if any(block.mac != b"" for block in blocks):
        made["mac_bytes"] = [len(block.mac) for block in blocks]
        made["mac"] = _words([block.mac.ljust(MAC_BYTES, b"\0") for block in blocks], MAC_BYTES)
    return made


def packed_uses(uses: Sequence[Use]) -> StoredRows:
    """As `packed`, of the keys and last uses alone."""
    made = np.zeros(len(uses), ROW)
    made["key"] = _words([key for key, _, _ in uses], KEY_END)
    made["worth"] = [worth for _, worth, _ in uses]
    made["uses"] = [count for _, _, count in uses]
    made["use_check"] = use_checks(made)
    return made


def unpacked(data: bytes) -> StoredRows:
    """Rows from the bytes of keys, rows and uses that follow each other; not to be changed."""
    return np.frombuffer(data, ROW)


def valid(rows: StoredRows) -> NDArray[np.bool_]:
    """Which rows match their checks, and are those of blocks that `pool.api.check_write` allows: the checks have no
    key, so that whoever can write the file can make a row that matches."""
    good: NDArray[np.bool_] = (rows["row_check"] == row_checks(rows)) & (rows["use_check"] == use_checks(rows))
    good &= (rows["size"] >= 1) & (rows["size"] <= BLOCK_BYTES_MAX) & (rows["offset"] < 1 << 62)
    good &= np.isin(rows["tenant_bytes"] & ~np.uint8(COPY), (0, TENANT_BYTES)) & np.isin(
        rows["mac_bytes"], (0, MAC_BYTES)
    )
    return good & (rows["rebuild_s"] >= 0) & (rows["rebuild_s"] <= REBUILD_S_MAX) & valid_uses(rows)


def valid_uses(rows: StoredRows) -> NDArray[np.bool_]:
    """Which rows have a possible last use."""
    good: NDArray[np.bool_] = (rows["worth"] >= 0) & (rows["worth"] <= WORTH_MAX) & (rows["uses"] < 1 << 63)
    return good


def parts(rows: StoredRows) -> list[tuple[BlockKey, bytes, bytes]]:
    """The bytes of key, row and use of each row."""
    data, step = rows.tobytes(), ROW.itemsize
    each = range(0, len(data), step)
    return [(data[at : at + KEY_END], data[at + KEY_END : at + ROW_END], data[at + ROW_END : at + step]) for at in each]


def keys_of(rows: StoredRows) -> list[BlockKey]:
    """The keys of the rows."""
    data = rows["key"].tobytes()
    return [data[at : at + KEY_END] for at in range(0, len(data), KEY_END)]


def ends_of(rows: StoredRows) -> NDArray[np.int64]:
    """Where the extent of each row ends, in bytes (those of a valid row)."""
    lengths = -(-rows["size"].astype(np.int64) // STAGING_ALIGNMENT_BYTES) * STAGING_ALIGNMENT_BYTES
    ends: NDArray[np.int64] = rows["offset"].astype(np.int64) + lengths
    return ends


def stored_blocks(rows: StoredRows) -> list[Stored]:
    """Blocks and their eviction values (`member` is 0; the caller sets it)."""
    return [(_block(row), row[12]) for row in zip(*(rows[name].tolist() for name in ROW.names or ()), strict=True)]


def tenant_tag_of(tenant: int, tenant_bytes: int) -> bytes:
    """The tag of a tenant, from its number and length in a row."""
    tag = tenant.to_bytes(TENANT_BYTES, "little")[: tenant_bytes & ~COPY]
    return copy_of(tag) if tenant_bytes & COPY else tag


def checked_again(rows: StoredRows) -> StoredRows:
    """The rows with checks that match, and positions and counts that the table of a pool has."""
    rows["position"] %= CYCLE_BLOCKS
    rows["uses"] = np.minimum(rows["uses"], USES_COUNTED_MAX)
    rows["row_check"], rows["use_check"] = row_checks(rows), use_checks(rows)
    return rows


def _block(row: tuple[object, ...]) -> Block:
    key, parent, offset, checksum, rebuild_s, size, position, tenant_bytes, mac_bytes, tenant, mac, _, _, uses, _ = row
    assert isinstance(tenant, int) and isinstance(tenant_bytes, int) and isinstance(mac_bytes, int)
    assert isinstance(offset, int) and isinstance(size, int) and isinstance(position, int) and isinstance(uses, int)
    assert isinstance(checksum, int) and isinstance(rebuild_s, float)
    named = tenant_tag_of(tenant, tenant_bytes)
    block = Block(_bytes(key), _bytes(parent), 0, offset, size, position, checksum, named, rebuild_s, uses)
    block.mac = _bytes(mac)[:mac_bytes]
    return block


def _bytes(words: object) -> bytes:
    assert isinstance(words, list)
    return b"".join(word.to_bytes(8, "little") for word in words)


def _words(values: Sequence[bytes], length: int) -> NDArray[np.uint64]:
    if any(len(value) != length for value in values):
        raise ValueError(f"a value is not {length} bytes long")
    return np.frombuffer(b"".join(values), "<u8").reshape(len(values), length // 8)


def row_checks(rows: StoredRows) -> NDArray[np.uint64]:
    """The checks over what never changes."""
    words = _columns(rows, 0, ROW_END - 8)
    return _mixed(words, _ROW_SEED)


def use_checks(rows: StoredRows) -> NDArray[np.uint64]:
    """The checks over last uses."""
    words = np.concatenate((_columns(rows, 0, KEY_END), _columns(rows, ROW_END, ROW.itemsize - 8)))
    return _mixed(words, _USE_SEED)


def _columns(rows: StoredRows, first: int, last: int) -> NDArray[np.uint64]:
    """The words of the rows between two bytes, a row of words for each."""
    words = np.ascontiguousarray(rows).view("<u8").reshape(len(rows), ROW.itemsize // 8)
    return words[:, first // 8 : last // 8].T


def _mixed(words: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """A check of 64 bits: each word changes it one to one, so that no change of one word is missed."""
    found = np.full(words.shape[1], seed, np.uint64)
    for word in words:
        found = (found ^ word) * _FIRST
        found ^= found >> np.uint64(29)
        found *= _SECOND
        found ^= found >> np.uint64(32)
    return found
