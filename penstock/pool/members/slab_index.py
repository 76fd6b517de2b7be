"""The table file of a slab: one SQLite row for each block, each with its own checksum; opened, upgraded, salvaged.

ROW-1  Statement: A row is valid only if both of its checksums match: over the block's columns, and over its last use.
ROW-2  Statement: A table that SQLite reports as damaged is moved aside; its valid rows are copied to a new table.
Verification: tests/pool/members/test_journal_rows.py.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from penstock.core.keys import KEY_BYTES, BlockKey
from penstock.core.new_block import BLOCK_BYTES_MAX, MAC_BYTES, REBUILD_S_MAX, TENANT_BYTES
from penstock.pool.block import Block
from penstock.pool.members.header import SlabRefused
from penstock.pool.members.table_file import own_table

TABLE_FORMAT = 3
OLD_FORMATS = (1, 2)  # upgraded to TABLE_FORMAT when a table is opened
WORTH_MAX = 1e20  # above format 1's nanoseconds; a larger value would raise those of all later blocks
LOCKED_WAIT_S = 1.0
T = TypeVar("T")
Row = tuple[Any, ...]
Stored = tuple[Block, float]  # a block and its last use
Use = tuple[BlockKey, float, int]  # a key, its last use, how often it was used

_META = "CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID"
_BLOCKS = (
    "CREATE TABLE blocks (key BLOB PRIMARY KEY, parent BLOB NOT NULL, offset INTEGER NOT NULL, size INTEGER NOT NULL, "
    "position INTEGER NOT NULL, checksum BLOB NOT NULL, tenant BLOB NOT NULL, rebuild_s REAL NOT NULL, "
    "mac BLOB NOT NULL, row_check BLOB NOT NULL, used REAL NOT NULL, uses INTEGER NOT NULL, use_check BLOB NOT NULL"
    ") WITHOUT ROWID"
)
_INSERT = "INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_UPDATE = "UPDATE blocks SET used = ?, uses = ?, use_check = ? WHERE key = ?"
_VALUE_BYTES_MAX = 1 << 20  # of a value, row or statement; a valid row has about 200
_META_ROWS_MAX = 64
_COLUMNS = 13
_COLUMNS_FORMAT_2 = 12  # no MAC
_COLUMNS_FORMAT_1 = 7
_ROW_REFUSED = (  # errors caused by the content of one row
    sqlite3.IntegrityError,
    sqlite3.DataError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
    ArithmeticError,
    ValueError,
    TypeError,
)
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


def row_of(block: Block, use: float) -> Row:
    """All columns of a block's row."""
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
    return (*says, _check(says), *_use_columns(block.key, use, block.uses))


def block_of(row: Row) -> Stored | None:
    """The block that a row describes (`member` is 0; the caller sets it); None for a row that is not valid."""
    if len(row) == _COLUMNS_FORMAT_1:
        row = _row_of_format_1(row)
    if len(row) not in (_COLUMNS, _COLUMNS_FORMAT_2):
        return None
    *says, row_check, used, uses, use_check = row
    key, parent, offset, size, position, checksum, tenant, rebuild_s = says[:8]
    mac = says[8] if len(row) == _COLUMNS else b""
    if row_check != _check(says) or use_check != _check((key, used, uses)):
        return None
    # the checksum has no key: whoever can write the file can forge a row that matches
    if not _is_possible((*says[:8], mac, used, uses)):
        return None
    number = int.from_bytes(checksum, "little")
    return Block(key, parent, 0, offset, size, position, number, tenant, rebuild_s, uses, mac=mac), used


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


def read_rows(db: sqlite3.Connection) -> Iterator[Row]:
    """Every row, unchecked; raises sqlite3.Error where the file is damaged."""
    _refuse_made_up(db, "blocks")
    yield from db.execute("SELECT * FROM blocks")


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
        try:
            self._db, damage = self._connect()
            if damage is not None:
                self._db.close()
                self._salvage(damage)
            self.identity = self._prepare()
        except sqlite3.Error as error:
            raise OSError(f"the table {path} cannot be opened: {error}") from error

    def rows(self) -> tuple[list[Stored], list[Any]]:
        """All blocks with their last use, and the keys of the rows that are not valid."""
        good: list[Stored] = []
        bad: list[Any] = []
        for row in read_rows(self._db):
            found = block_of(row)
            good.append(found) if found else bad.append(row[0])
        return good, bad

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
            refused += self._each(_INSERT, list(inserts), lambda stored: stored[0].key, lambda stored: row_of(*stored))
            refused += self._each(_UPDATE, list(uses), lambda use: use[0], lambda use: (*_use_columns(*use), use[0]))
        return refused

    def _each(
        self, sql: str, items: Sequence[T], key_of: Callable[[T], BlockKey], row_of: Callable[[T], Row]
    ) -> list[tuple[BlockKey, str]]:
        """Execute a statement for all items at once; if one is refused, execute it item by item, without those that are
        refused."""
        self._db.execute("SAVEPOINT rows")
        try:
            self._db.executemany(sql, [row_of(item) for item in items])
            return []
        except _ROW_REFUSED:
            self._db.execute("ROLLBACK TO rows")
        finally:
            self._db.execute("RELEASE rows")
        refused: list[tuple[BlockKey, str]] = []
        for item in items:
            try:
                self._db.execute(sql, row_of(item))
            except _ROW_REFUSED as error:
                refused.append((key_of(item), str(error)))
        return refused

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
        rest = f"{len(kept)} blocks in it can still be read" if kept else "the slab is empty"
        self.notes.append(f"the table {self.path} was unreadable ({damage}); moved to {aside}, {rest}")

    def _prepare(self) -> bytes | None:
        """Create or upgrade the table to this format; returns the id of its slab."""
        meta = meta_of(self._db)
        version = meta.get("format")
        if version is None:
            self._create(None, [])
        elif version in OLD_FORMATS:
            self._upgrade(version, identity_of(meta))
        elif version != TABLE_FORMAT:
            self._db.close()
            raise SlabRefused(
                f"{self.path} is a table of format {version}, this version reads format {TABLE_FORMAT}; "
                f"delete it and its slab to start empty"
            )
        return identity_of(meta_of(self._db))

    def _create(self, identity: bytes | None, rows: Iterable[Stored]) -> None:
        with self._transaction():
            self._db.execute("DROP TABLE IF EXISTS meta")
            self._db.execute("DROP TABLE IF EXISTS blocks")
            self._db.execute(_META)
            self._db.execute(_BLOCKS)
            values = [("format", TABLE_FORMAT), *([("slab", identity)] if identity else [])]
            self._db.executemany("INSERT INTO meta VALUES (?, ?)", values)
            self._db.executemany(_INSERT, [row_of(block, use) for block, use in rows])

    def _upgrade(self, version: int, identity: bytes | None) -> None:
        """Upgrade from an older format, in place and in one transaction."""
        rows = [found for row in read_rows(self._db) if (found := block_of(row))]
        self._create(identity, rows)
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


def readable_rows(path: Path) -> tuple[bytes | None, list[Stored]]:
    """The readable part of a damaged table: the id of its slab, and its valid rows, read from both ends."""
    found: dict[BlockKey, Stored] = {}
    identity = None
    with contextlib.suppress(sqlite3.Error, UnicodeDecodeError), contextlib.closing(connect_read_only(path)) as db:
        identity = identity_of(meta_of(db))
        _refuse_made_up(db, "blocks")
        for order in ("ASC", "DESC"):
            with contextlib.suppress(sqlite3.Error, UnicodeDecodeError):
                for row in db.execute(f"SELECT * FROM blocks ORDER BY key {order}"):  # noqa: S608 (one of two words)
                    stored = block_of(row) if len(row) in (_COLUMNS, _COLUMNS_FORMAT_2) else None
                    if stored is not None:
                        found[stored[0].key] = stored
    return (identity, list(found.values())) if identity is not None else (None, [])
