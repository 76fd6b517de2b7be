"""What the tests do to the table of a slab behind the pool's back, and rows as older versions wrote them."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from penstock.core.keys import BlockKey
from penstock.pool.block import Block
from penstock.pool.members.slab_index import RowTable
from penstock.pool.members.stored_rows import ROW, StoredRows, keys_of, parts, unpacked

FORMAT_3 = (
    "CREATE TABLE blocks (key BLOB PRIMARY KEY, parent BLOB NOT NULL, offset INTEGER NOT NULL, size INTEGER NOT NULL, "
    "position INTEGER NOT NULL, checksum BLOB NOT NULL, tenant BLOB NOT NULL, rebuild_s REAL NOT NULL, "
    "mac BLOB NOT NULL, row_check BLOB NOT NULL, used REAL NOT NULL, uses INTEGER NOT NULL, use_check BLOB NOT NULL"
    ") WITHOUT ROWID"
)


def table_rows(table: Path) -> StoredRows:
    """The rows that the file of a table has, unchecked."""
    with contextlib.closing(sqlite3.connect(table)) as db:
        return unpacked(b"".join(b"".join(row) for row in db.execute("SELECT key, row, use FROM blocks"))).copy()


def offsets(table: Path) -> dict[BlockKey, int]:
    """Where each block begins."""
    rows = table_rows(table)
    return dict(zip(keys_of(rows), rows["offset"].tolist(), strict=True))


def alter(table: Path, change: Callable[[StoredRows], object], key: BlockKey | None = None) -> None:
    """Change values of all rows, or of one, and leave their checks as they are."""
    rows = table_rows(table)
    if key is not None:
        rows = rows[[one == key for one in keys_of(rows)]]
    change(rows)
    with contextlib.closing(sqlite3.connect(table)) as db, db:
        db.executemany("INSERT OR REPLACE INTO blocks VALUES (?, ?, ?)", parts(rows))


def old_row_of(block: Block, use: float) -> tuple[Any, ...]:
    """All columns of a block's row in format 3."""
    says = (
        block.key,
        block.parent,
        block.offset,
        block.size_bytes,
        block.position,
        block.checksum.to_bytes(8, "little"),
        block.tenant,
        float(block.rebuild_s),
        block.mac,
    )
    return (*says, check_of(says), float(use), block.uses, check_of((block.key, float(use), block.uses)))


def check_of(columns: tuple[Any, ...]) -> bytes:
    """The checksum of format 3 over values and their types."""
    return xxhash.xxh3_64_digest(repr(columns).encode())


def as_format_3(path: Path) -> int:
    """Write a table as version 3 did, from what it has; returns how many rows that are."""
    table = RowTable(path)
    rows = [old_row_of(block, use) for block, use in table.rows()[0]]
    table.close()
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("DROP TABLE blocks")
        db.execute(FORMAT_3)
        db.execute("UPDATE meta SET value = 3 WHERE name = 'format'")
        db.executemany(f"INSERT INTO blocks VALUES ({', '.join('?' * 13)})", rows)
    return len(rows)


def flipped(rows: StoredRows, bit: int) -> StoredRows:
    """One row with one bit changed."""
    data = np.frombuffer(rows.tobytes(), np.uint8).copy()
    data[bit // 8] ^= 1 << bit % 8
    return np.frombuffer(data.tobytes(), ROW).copy()
