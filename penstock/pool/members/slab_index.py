"""The table file of a slab: one SQLite row for each block, packed (`stored_rows`); opened, upgraded, salvaged.

ROW-2  Statement: A table that SQLite reports as damaged is moved aside; its valid rows are copied to a new table.
Verification: tests/pool/members/test_journal_rows.py.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from penstock.core.keys import BlockKey
from penstock.pool.members.header import SlabRefused
from penstock.pool.members.old_rows import FORMAT_1_COLUMNS, OLD_FORMATS, Row, block_of
from penstock.pool.members.stored_rows import (
    KEY_END,
    REFUSED,
    ROW,
    ROW_END,
    Stored,
    StoredRows,
    Use,
    checked_again,
    keys_of,
    packed,
    packed_uses,
    parts,
    stored_blocks,
    unpacked,
    valid,
    valid_uses,
)
from penstock.pool.members.table_file import own_table

TABLE_FORMAT = 4
LOCKED_WAIT_S = 1.0
ROWS_AT_ONCE = 8192  # read together
TRIED_BYTES = 16 << 10
T = TypeVar("T", Stored, Use)

_META = "CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID"
_BLOCKS = "CREATE TABLE blocks (key BLOB PRIMARY KEY, row BLOB NOT NULL, use BLOB NOT NULL) WITHOUT ROWID"
_INSERT = "INSERT OR REPLACE INTO blocks VALUES (?, ?, ?)"
_UPDATE = "UPDATE blocks SET use = ? WHERE key = ?"
_LENGTHS = (KEY_END, ROW_END - KEY_END, ROW.itemsize - ROW_END)
_WHOLE = " AND ".join(  # a row whose values have the types and lengths of a packed one
    f"typeof({name}) = 'blob' AND length({name}) = {length}"
    for name, length in zip(("key", "row", "use"), _LENGTHS, strict=True)
)
_SELECT = f"SELECT CASE WHEN {_WHOLE} THEN CAST(key || row || use AS BLOB) END FROM blocks"  # noqa: S608 (constants)
_VALUE_BYTES_MAX = 1 << 20  # of a value, row or statement; a valid row has about 200
_META_ROWS_MAX = 64
_OUTSIDE_CAUSES = {  # SQLite errors caused by the file's surroundings, not by its content
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_AUTH,
    sqlite3.SQLITE_NOMEM,
}


def read_rows(db: sqlite3.Connection) -> tuple[StoredRows, list[Any]]:
    """The valid rows of a table of any format, and the keys of the others; raises sqlite3.Error where the file is
    damaged."""
    _refuse_made_up(db, "blocks")
    good: list[StoredRows] = [np.zeros(0, ROW)]
    bad: list[Any] = []
    columns = db.execute("SELECT * FROM blocks LIMIT 0").description
    if [name for name, *_ in columns] != ["key", "row", "use"]:
        for rows in _in_parts(db.execute("SELECT * FROM blocks")):
            kept, dropped = _sorted_out(rows)
            good.append(kept)
            bad += dropped
        return _joined(good), bad
    broken = False
    for rows in _in_parts(db.execute(_SELECT)):
        whole = [row for (row,) in rows if row is not None]
        broken |= len(whole) < len(rows)
        kept, dropped = _valid(b"".join(whole))
        good.append(kept)
        bad += dropped
    if broken:  # a scan over all again, which a sound table does not need
        bad += [key for (key,) in db.execute(f"SELECT key FROM blocks WHERE NOT ({_WHOLE})")]  # noqa: S608 (a constant)
    return _joined(good), bad


def _joined(some: Sequence[StoredRows]) -> StoredRows:
    """Rows one after the other; joined as bytes, which numpy copies faster than rows."""
    return np.concatenate([rows.view(np.uint8) for rows in some]).view(ROW)


def _in_parts(cursor: sqlite3.Cursor) -> Iterator[list[Row]]:
    while rows := cursor.fetchmany(ROWS_AT_ONCE):
        yield rows


def _sorted_out(rows: Sequence[Row]) -> tuple[StoredRows, list[Any]]:
    """The valid ones of some rows of one format, and the keys of the others."""
    if len(rows[0]) != len(_LENGTHS):
        found = [block_of(row) for row in rows]
        kept = checked_again(packed([one for one in found if one is not None]))
        return kept, [row[0] for row, one in zip(rows, found, strict=True) if one is None]
    bad = [row[0] for row in rows if not _is_whole(row)]
    stored, others = _valid(b"".join(chain.from_iterable(row for row in rows if _is_whole(row))))
    return stored, bad + others


def _valid(data: bytes) -> tuple[StoredRows, list[BlockKey]]:
    """The valid rows, and the keys of the others."""
    stored = unpacked(data)
    good = valid(stored)
    return (stored, []) if good.all() else (stored[good], keys_of(stored[~good]))


def _is_whole(row: Row) -> bool:
    """Whether the values of a row have the types and lengths of a packed one."""
    key, says, use = row
    return type(key) is type(says) is type(use) is bytes and (len(key), len(says), len(use)) == _LENGTHS


def connect_read_only(path: Path) -> sqlite3.Connection:
    """Open the table read-only. Raises sqlite3.Error, or OSError where it is not this user's."""
    db = sqlite3.connect(f"{own_table(path).as_uri()}?mode=ro", uri=True, timeout=LOCKED_WAIT_S)
    _bound(db)
    return db


def _bound(db: sqlite3.Connection) -> None:
    """Protect against a forged file: nothing in it is executed, and none of its values can exhaust memory."""
    db.text_factory = _text
    for limit in (sqlite3.SQLITE_LIMIT_LENGTH, sqlite3.SQLITE_LIMIT_SQL_LENGTH):
        db.setlimit(limit, _VALUE_BYTES_MAX)
    db.execute("PRAGMA trusted_schema = OFF")


def _refuse_made_up(db: sqlite3.Connection, name: str) -> None:
    """Raise sqlite3.DatabaseError where `name` is a view or a virtual table: it could have endless rows that are not in
    the file."""
    found = db.execute("SELECT type, sql FROM sqlite_schema WHERE name = ?", (name,)).fetchone()
    if found is not None and (found[0] != "table" or not str(found[1]).upper().startswith("CREATE TABLE")):
        raise sqlite3.DatabaseError(f"{name} is not a table")


def damage_of(db: sqlite3.Connection) -> str | None:
    """The damage that SQLite finds in the file; None when there is none."""
    try:
        answer = db.execute("PRAGMA quick_check(1)").fetchone()
        if answer != ("ok",):
            return " ".join(str(answer[0] if answer else "no answer").split())
        schema = db.execute("SELECT type, name, sql FROM sqlite_schema").fetchmany(_META_ROWS_MAX)
        found = {name: sql for kind, name, sql in schema if kind == "table"}
        version = meta_of(db).get("format")
        if any(kind in ("view", "trigger") for kind, _, _ in schema):
            return "its schema was changed"
        if found and not isinstance(version, int):
            return "it does not say which format it has"
        if version == TABLE_FORMAT and found != {"meta": _META, "blocks": _BLOCKS}:
            return "its schema was changed"
    except UnicodeDecodeError:
        return "its schema is not readable"
    except sqlite3.Error as error:
        if is_outside_cause(error) or _is_read_only(error):
            raise
        return str(error)
    return None


def meta_of(db: sqlite3.Connection) -> dict[str, Any]:
    """`format`, `slab` (the id of the slab), and `place` (where that was last opened). Empty for an empty table."""
    if not db.execute("SELECT 1 FROM sqlite_schema WHERE name = 'meta'").fetchone():
        return {}
    _refuse_made_up(db, "meta")
    return dict(db.execute("SELECT name, value FROM meta").fetchmany(_META_ROWS_MAX))


def identity_of(meta: Mapping[str, Any]) -> bytes | None:
    """The id of the slab that a table names; None where it names none."""
    found = meta.get("slab")
    return found if isinstance(found, bytes) and len(found) == 16 else None


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def is_outside_cause(error: sqlite3.Error) -> bool:
    """Whether the cause lies outside of the table's content: a lock, permissions, disk space, the file system."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in _OUTSIDE_CAUSES


def _is_read_only(error: sqlite3.Error) -> bool:
    """Whether the file cannot be written: no permission, or a format that only a later SQLite may write."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_READONLY


class RowTable:
    """The rows of one slab. Used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the table. Raises SlabRefused (other format) or OSError."""
        self.path = path
        self.notes: list[str] = []
        self.opened: StoredRows | None = None  # the rows that it has within the slab, until somebody has taken them
        try:
            self._db, damage = self._connect()
            if damage is not None:
                self._db.close()
                self._salvage(damage)
            self.identity = self._prepare()
        except sqlite3.Error as error:
            raise OSError(f"the table {path} cannot be opened: {error}") from error

    def read(self) -> tuple[StoredRows, list[Any]]:
        """All valid rows, and the keys of the others."""
        return read_rows(self._db)

    def rows(self) -> tuple[list[Stored], list[Any]]:
        """As `read`, as blocks with their last use."""
        good, bad = self.read()
        return stored_blocks(good), bad

    def start_empty(self, identity: bytes) -> None:
        """Delete every row; the table now belongs to the slab with this id."""
        with self._transaction():
            self._db.execute("DELETE FROM blocks")
            self._db.execute("DELETE FROM meta WHERE name = 'place'")
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('slab', ?)", (identity,))
        self.identity = identity

    def take_over(self, identity: bytes) -> None:
        """Leave the rows unchanged; the table now belongs to the slab with this id."""
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('slab', ?)", (identity,))
        self.identity = identity

    def remember_place(self, place: str) -> None:
        """Record where the slab lies now; written only when that changed."""
        if meta_of(self._db).get("place") != place:
            with self._transaction():
                self._db.execute("INSERT OR REPLACE INTO meta VALUES ('place', ?)", (place,))

    def change(
        self, deletes: Iterable[BlockKey], inserts: Iterable[Stored], uses: Iterable[Use]
    ) -> list[tuple[BlockKey, str]]:
        """Delete, insert and record uses in one durable transaction; returns the keys of rows that the table refused (a
        NaN, a number beyond 64 bits), with the reason. Raises sqlite3.Error; nothing has changed then."""
        refused: list[tuple[BlockKey, str]] = []
        with self._transaction():
            self._db.executemany("DELETE FROM blocks WHERE key = ?", [(key,) for key in deletes])
            rows, why = _packed_each(list(inserts), packed, lambda rows: valid(rows), lambda one: one[0].key)
            self._db.executemany(_INSERT, parts(rows))
            refused += why
            rows, why = _packed_each(list(uses), packed_uses, valid_uses, lambda one: one[0])
            self._db.executemany(_UPDATE, [(use, key) for key, _, use in parts(rows)])
            refused += why
        return refused

    def try_to_write(self) -> None:
        """Write to the file as much as a few rows take, and remove it. Raises sqlite3.Error where that is refused."""
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('room', zeroblob(?))", (TRIED_BYTES,))
        with self._transaction():
            self._db.execute("DELETE FROM meta WHERE name = 'room'")

    def close(self) -> None:
        """Close the file; an error of SQLite is ignored, as every commit is durable already."""
        with contextlib.suppress(sqlite3.Error):
            self._db.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise

    def _connect(self) -> tuple[sqlite3.Connection, str | None]:
        """The open file, and its damage if any. It moves from the opening thread to the journal's, so SQLite's check is
        off."""
        real = own_table(self.path, self.notes)
        db = sqlite3.connect(real, check_same_thread=False, timeout=LOCKED_WAIT_S, isolation_level=None)
        try:
            _bound(db)
            damage = damage_of(db)
            if damage is None:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")
                db.execute("BEGIN IMMEDIATE")
                db.execute("ROLLBACK")
            return db, damage
        except sqlite3.Error as error:
            if is_outside_cause(error) or (_is_read_only(error) and not os.access(self.path, os.W_OK)):
                db.close()
                raise
            return db, str(error)
        except BaseException:
            db.close()
            raise

    def _salvage(self, damage: str) -> None:
        """Move the damaged table aside and start a new one with its valid rows."""
        aside = move_aside(self.path)
        identity, kept = readable_rows(aside)
        self._db, again = self._connect()
        if again is not None:
            raise OSError(f"a new table {self.path} cannot be made: {again}")
        if identity is not None:
            self._create(identity, kept)
        rest = f"{len(kept)} blocks in it can still be read" if len(kept) else "the slab is empty"
        self.notes.append(f"the table {self.path} was unreadable ({damage}); moved to {aside}, {rest}")

    def _prepare(self) -> bytes | None:
        """Create or upgrade the table to this format; returns the id of its slab."""
        meta = meta_of(self._db)
        version = meta.get("format")
        if version is None:
            self._create(None, np.zeros(0, ROW))
        elif version in OLD_FORMATS:
            self._upgrade(version, identity_of(meta))
        elif version != TABLE_FORMAT:
            self._db.close()
            raise SlabRefused(
                f"{self.path} is a table of format {version}, this version reads format {TABLE_FORMAT}; "
                f"delete it and its slab to start empty"
            )
        return identity_of(meta_of(self._db))

    def _create(self, identity: bytes | None, rows: StoredRows) -> None:
        with self._transaction():
            self._db.execute("DROP TABLE IF EXISTS meta")
            self._db.execute("DROP TABLE IF EXISTS blocks")
            self._db.execute(_META)
            self._db.execute(_BLOCKS)
            values = [("format", TABLE_FORMAT), *([("slab", identity)] if identity else [])]
            self._db.executemany("INSERT INTO meta VALUES (?, ?)", values)
            for at in range(0, len(rows), ROWS_AT_ONCE):
                self._db.executemany(_INSERT, parts(rows[at : at + ROWS_AT_ONCE]))

    def _upgrade(self, version: int, identity: bytes | None) -> None:
        """Upgrade from an older format, in place and in one transaction."""
        self._create(identity, read_rows(self._db)[0])
        self.notes.append(f"the table {self.path} was of format {version} and is of format {TABLE_FORMAT} now")


def move_aside(path: Path) -> Path:
    """Rename a table that cannot be used, and its log, which must not be applied to a new table; returns the new
    path."""
    aside = _unused_name(path.with_name(path.name + ".unreadable"))
    path.replace(aside)
    for suffix in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).replace(aside.with_name(aside.name + suffix))
    return aside


def _unused_name(path: Path) -> Path:
    """`path`, or `path` with the first unused number: a table moved aside before is never overwritten."""
    if not path.exists():
        return path
    return next(other for n in itertools.count(2) if not (other := path.with_name(f"{path.name}-{n}")).exists())


def readable_rows(path: Path) -> tuple[bytes | None, StoredRows]:
    """The readable part of a damaged table: the id of its slab, and its valid rows, read from both ends."""
    found: dict[BlockKey, StoredRows] = {}
    identity = None
    with contextlib.suppress(sqlite3.Error, UnicodeDecodeError), contextlib.closing(connect_read_only(path)) as db:
        identity = identity_of(meta_of(db))
        _refuse_made_up(db, "blocks")
        for order in ("ASC", "DESC"):
            with contextlib.suppress(sqlite3.Error, UnicodeDecodeError):
                for row in db.execute(f"SELECT * FROM blocks ORDER BY key {order}"):  # noqa: S608 (one of two words)
                    if len(row) == FORMAT_1_COLUMNS:  # without checksums
                        continue
                    stored = _sorted_out([row])[0]
                    found |= {key: stored for key in keys_of(stored)}
    rows = np.concatenate([np.zeros(0, ROW), *found.values()])
    return (identity, rows) if identity is not None else (None, rows[:0])


def _packed_each(
    items: list[T],
    pack: Callable[[Sequence[T]], StoredRows],
    possible: Callable[[StoredRows], Any],
    key_of: Callable[[T], BlockKey],
) -> tuple[StoredRows, list[tuple[BlockKey, str]]]:
    """Pack items together; those that no row can have are refused, each with the reason."""
    try:
        rows = pack(items)
    except REFUSED as error:
        if len(items) == 1:
            return np.zeros(0, ROW), [(key_of(items[0]), str(error))]
        each = [_packed_each([item], pack, possible, key_of) for item in items]
        return np.concatenate([rows for rows, _ in each]), [one for _, why in each for one in why]
    good = possible(rows)
    return rows[good], [(key, "no block has such values") for key in keys_of(rows[~good])]
