"""The durable half of a slab member: its header, and one SQLite row for each block, written after the block's bytes.

P1  A row is committed after its block's bytes are on the device (fdatasync), so each row names complete data.
P2  An extent is written again only after the deletion of its old row is committed (`commit_sequence`).
P3  Rows count only together with the slab they were written for: both carry one random id.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from penstock.core.keys import KEY_BYTES, BlockKey
from penstock.core.layout import STAGING_ALIGNMENT_BYTES
from penstock.pool.table import Block

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
HEADER_BYTES = STAGING_ALIGNMENT_BYTES
_MAGIC = b"PENSTOCK SLAB\n\0\0"
_HEADER = struct.Struct("<16sI16s")
INSERT_DELAY_S = 0.03  # how long rows wait for company; a deletion that a store waits for goes at once
USE_FLUSH_S = 10.0
RETRY_S = 1.0
CLOSE_TIMEOUT_S = 10.0


class SlabRefused(OSError):
    """The slab or its table is something that this version must not touch."""


def read_header(path: Path) -> bytes | None:
    """The id of an existing slab; None when there is none yet. Raises SlabRefused for other content or format."""
    try:
        with path.open("rb") as slab:
            raw = slab.read(HEADER_BYTES)
    except FileNotFoundError:
        return None
    if not any(raw):
        return None
    if len(raw) < _HEADER.size or not raw.startswith(_MAGIC):
        raise SlabRefused(f"{path} holds something that is not a Penstock slab; name another file, or erase this one")
    _, version, identity = _HEADER.unpack_from(raw)
    if version != FORMAT_VERSION:
        raise SlabRefused(
            f"{path} is a slab of format {version}, this version reads format {FORMAT_VERSION}; "
            f"delete it and its .db file to start empty"
        )
    return bytes(identity)


def write_header(path: Path, identity: bytes) -> None:
    """Mark the slab as ours, durably."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(fd, _HEADER.pack(_MAGIC, FORMAT_VERSION, identity).ljust(HEADER_BYTES, b"\0"), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


class Journal:
    """Rows of one slab. `record`, `forget` and `used` may be called from any thread and return at once; one thread
    commits them in order, many at a time."""

    def __init__(self, slab: Path, table: Path, slab_bytes: int) -> None:
        """`slab_bytes` is how long the slab was before it was opened: rows beyond it are dropped.

        Raises SlabRefused (wrong format, other content) or OSError.
        """
        self.notes: list[str] = []
        self._slab = slab
        self._path = table
        self.on_commit: Callable[[], None] = lambda: None  # after each try, on the journal's thread
        self._changed = threading.Condition()
        self._inserts: dict[BlockKey, tuple[Block, int]] = {}
        self._deletes: set[BlockKey] = set()
        self._uses: dict[BlockKey, int] = {}
        self._sequence = 0  # last deletion asked for
        self._committed = 0  # last deletion committed
        self._closing = False
        self._failed: str | None = None
        identity = read_header(slab)
        self._db = self._open(identity, slab_bytes)
        self._slab_fd = os.open(slab, os.O_WRONLY | os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name=f"penstock-journal-{slab.name}", daemon=True)
        self._thread.start()

    @property
    def committed(self) -> int:
        return self._committed

    @property
    def failed(self) -> str | None:
        """Why rows cannot be committed at present; None when they can."""
        return self._failed

    @property
    def sequence(self) -> int:
        """The last deletion asked for: a store into space freed so far waits until `committed` reaches it."""
        return self._sequence

    def rows(self) -> list[tuple[Block, int]]:
        """All blocks of the slab with their last use (`member` is 0 and for the caller to set). Before any change."""
        found = []
        cursor = self._db.execute("SELECT key, parent, offset, size, position, checksum, used FROM blocks")
        for key, parent, offset, size, position, checksum, used in cursor:
            if isinstance(key, bytes) and isinstance(parent, bytes) and len(key) == len(parent) == KEY_BYTES:
                block = Block(key, parent, 0, offset, size, position, int.from_bytes(checksum, "little"))
                found.append((block, used))
        return found

    def record(self, block: Block, use: int) -> None:
        """The block's bytes are on the device: commit its row soon."""
        with self._changed:
            self._inserts[block.key] = (block, use)
            self._changed.notify()

    def forget(self, blocks: Iterable[Block]) -> None:
        """Delete rows; their extents may be written again once `committed` reaches the new `sequence`."""
        with self._changed:
            for block in blocks:
                self._inserts.pop(block.key, None)
                self._uses.pop(block.key, None)
                self._deletes.add(block.key)
            self._sequence += 1
            self._changed.notify()

    def used(self, uses: Iterable[tuple[BlockKey, int]]) -> None:
        """Note last uses; committed lazily, every `USE_FLUSH_S` and at the end."""
        with self._changed:
            self._uses.update(uses)

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Commit everything and close."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.error("journal of %s did not end within %.1f s", self._slab, timeout_s)
            return
        with contextlib.suppress(sqlite3.Error):
            self._db.close()
        os.close(self._slab_fd)

    def _open(self, identity: bytes | None, slab_bytes: int) -> sqlite3.Connection:
        try:
            db = self._connect()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and "malformed" not in str(error):
                raise OSError(f"the table {self._path} cannot be opened: {error}") from error
            aside = self._path.with_name(self._path.name + ".unreadable")
            self._path.replace(aside)
            self.notes.append(f"the table {self._path} was unreadable ({error}); moved to {aside}, the slab is empty")
            db = self._connect()
        meta = dict(db.execute("SELECT name, value FROM meta").fetchall())
        version = meta.get("format")
        if version is not None and version != FORMAT_VERSION:
            db.close()
            raise SlabRefused(
                f"{self._path} is a table of format {version}, this version reads format {FORMAT_VERSION}; "
                f"delete it and its slab to start empty"
            )
        rows = db.execute("SELECT count(*) FROM blocks").fetchone()[0]
        if identity is None or meta.get("slab") != identity:
            if rows:
                self.notes.append(f"{self._slab} is not the slab that {self._path} describes: {rows} blocks dropped")
            identity = uuid.uuid4().bytes
            with db:
                db.execute("DELETE FROM blocks")
                db.executemany(
                    "INSERT OR REPLACE INTO meta VALUES (?, ?)", [("format", FORMAT_VERSION), ("slab", identity)]
                )
            write_header(self._slab, identity)
            return db
        with db:
            cut = db.execute("DELETE FROM blocks WHERE offset + size > ?", (slab_bytes,)).rowcount
        if cut:
            self.notes.append(f"{self._slab} was cut to {slab_bytes} bytes: {cut} of {rows} blocks dropped")
        return db

    def _connect(self) -> sqlite3.Connection:
        # Used by the opening thread, then by the journal's thread only.
        db = sqlite3.connect(self._path, check_same_thread=False, timeout=1.0)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID")
            db.execute(
                "CREATE TABLE IF NOT EXISTS blocks (key BLOB PRIMARY KEY, parent BLOB NOT NULL, "
                "offset INTEGER NOT NULL, size INTEGER NOT NULL, position INTEGER NOT NULL, "
                "checksum BLOB NOT NULL, used INTEGER NOT NULL) "
                "WITHOUT ROWID"
            )
            db.execute("PRAGMA quick_check(1)").fetchone()
        except BaseException:
            db.close()
            raise
        return db

    def _run(self) -> None:
        next_flush_s = time.monotonic() + USE_FLUSH_S
        while True:
            with self._changed:
                if not (self._inserts or self._deletes or self._sequence > self._committed or self._closing):
                    self._changed.wait(USE_FLUSH_S)
                if not (self._closing or self._sequence > self._committed):
                    # Rows alone can wait a little; whoever needs a deletion wakes this up.
                    self._changed.wait_for(lambda: self._closing or self._sequence > self._committed, INSERT_DELAY_S)
                closing, sequence = self._closing, self._sequence
                inserts, self._inserts = self._inserts, {}
                deletes, self._deletes = self._deletes, set()
                uses: dict[BlockKey, int] = {}
                if closing or time.monotonic() >= next_flush_s:
                    uses, self._uses = self._uses, {}
                    next_flush_s = time.monotonic() + USE_FLUSH_S
            if self._commit_until_closing(inserts, deletes, uses):
                self._committed = sequence
                self.on_commit()
            if closing:
                return

    def _commit_until_closing(
        self, inserts: dict[BlockKey, tuple[Block, int]], deletes: set[BlockKey], uses: dict[BlockKey, int]
    ) -> bool:
        """Commit; where that fails (disk full, table locked), say so and try again. False when closing ends it."""
        while True:
            try:
                self._commit(inserts, deletes, uses)
            except (sqlite3.Error, OSError) as error:
                if self._failed is None:
                    log.error(
                        "rows of %s cannot be committed: %s; nothing is stored there meanwhile", self._slab, error
                    )
                self._failed = f"rows of {self._slab} cannot be committed: {error}"
                self.on_commit()
                with self._changed:
                    if self._closing:
                        return False
                    self._changed.wait_for(lambda: self._closing, RETRY_S)
            else:
                self._failed = None
                return True

    def _commit(
        self, inserts: dict[BlockKey, tuple[Block, int]], deletes: set[BlockKey], uses: dict[BlockKey, int]
    ) -> None:
        if not (inserts or deletes or uses):
            return
        if inserts:
            os.fdatasync(self._slab_fd)
        with self._db:
            self._db.executemany("DELETE FROM blocks WHERE key = ?", [(key,) for key in deletes])
            self._db.executemany(
                "INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (b.key, b.parent, b.offset, b.size_bytes, b.position, b.checksum.to_bytes(8, "little"), use)
                    for b, use in inserts.values()
                ],
            )
            self._db.executemany("UPDATE blocks SET used = ? WHERE key = ?", [(use, key) for key, use in uses.items()])
