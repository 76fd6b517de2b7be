"""Brings a slab and its table together: the table is found by the id in the slab's header, whatever the slab is called.

PAIR-1  Statement: Pairing never empties, moves or overwrites a file that holds blocks: a slab whose table is not found
        is refused, and a table that belongs to another slab is not changed.
PAIR-2  Statement: A file without a header (a new one, or a first page of zeros) is given one only if blocks prove that
        it is a slab, or if its first MiB has only zeros. The table at its default path is used only if it is empty, or
        if blocks that it names are present in the slab.
Verification: tests/pool/setup/test_slab_names.py. Fault: opening a slab through a symlink treated it as empty and wrote
a new header; opening it by its own name then dropped every block.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import stat
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from penstock.io.api import BlockEngine
from penstock.io.memory import aligned_buffer
from penstock.pool.checksum import block_checksum
from penstock.pool.members.header import (
    HEADER_BYTES,
    SlabRefused,
    pack_header,
    parse_header,
    read_page,
    refuse_foreign_content,
    transfer,
    write_header,
)
from penstock.pool.members.slab_index import (
    RowTable,
    connect_read_only,
    identity_of,
    is_outside_cause,
    meta_of,
    move_aside,
    readable_rows,
)
from penstock.pool.members.stored_rows import StoredRows, ends_of, keys_of, stored_blocks
from penstock.private_file import open_stored

TABLES_MAX = 4096  # examined in one folder
PROOF_BLOCKS = 16
FLIPPED_BITS_MAX = 8  # up to here, two ids count as one that was damaged
_SQLITE = b"SQLite format 3\0"


@dataclass(frozen=True, slots=True)
class TableFile:
    """What a table file contains. `place`: where its slab was last opened. `damaged`: it cannot be read; `log_lost`:
    all its rows were in its log, which cannot be read; `foreign`: a database of another program. None of these: a table
    that belongs to no slab yet."""

    path: Path
    identity: bytes | None = None
    place: str | None = None
    rows: bool = False
    damaged: bool = False
    log_lost: bool = False
    foreign: bool = False


def place_of(where: str) -> str:
    """The path of a slab without links: the same text for all of its names."""
    return os.path.realpath(where) if os.path.exists(where) else where


def default_table(path: Path) -> Path:
    """Default path of the table of a slab file: beside the file that `path` leads to."""
    real = Path(os.path.realpath(path))
    return real.with_name(real.name + ".db")


def folders_of(path: Path) -> list[Path]:
    """Folders in which the table of a slab may lie, one for each of its names."""
    return list(dict.fromkeys([Path(os.path.realpath(path)).parent, Path(os.path.abspath(path)).parent]))


def examine_table(path: Path) -> TableFile | None:
    """Examine a table file; None where there is none. Raises OSError where it cannot be opened."""
    if not os.path.exists(path):
        return None
    log_bytes = _size_bytes(path.with_name(path.name + "-wal"))
    try:
        with contextlib.closing(connect_read_only(path)) as db:
            names = {name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
            meta = meta_of(db) if "meta" in names else {}
            if names and "blocks" not in names and "format" not in meta:
                return TableFile(path, foreign=True)
            identity, place = identity_of(meta), meta.get("place")
            rows = "blocks" in names and db.execute("SELECT 1 FROM blocks LIMIT 1").fetchone() is not None
    except (sqlite3.Error, UnicodeDecodeError) as error:
        if isinstance(error, sqlite3.Error) and is_outside_cause(error):
            raise OSError(f"the table {path} cannot be opened: {error}") from error
        return TableFile(path, damaged=True)
    if identity is None and not rows and log_bytes:
        return TableFile(path, damaged=True, log_lost=True)
    return TableFile(path, identity, place if isinstance(place, str) else None, rows)


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def find_table(default: Path, identity: bytes, place: str, folders: Iterable[Path] = ()) -> TableFile | None:
    """The table of the slab with this id: at its default path, else anywhere in that folder or in `folders`; None when
    there is none. Raises SlabRefused where two tables match, or where the table belongs to another slab of which this
    one is a copy; OSError where the default one cannot be opened."""
    expected = examine_table(default)
    if expected is not None and expected.identity == identity:
        return expected
    others = [table for table in _tables_in([default.parent, *folders], default) if table.identity == identity]
    if len(others) > 1:
        raise SlabRefused(
            f"{place} has {len(others)} tables ({', '.join(str(table.path) for table in others[:3])}); "
            f"allowed: one; move the others out of the folder, or name it {default}"
        )
    if not others:
        return None
    original = others[0].place
    if original is not None and original != place and _holds_slab(original, identity) and not _same(original, place):
        raise SlabRefused(
            f"{place} is a copy of the slab {original}, whose table is {others[0].path}; "
            f"allowed: with a copy of that table as {default}"
        )
    return others[0]


def open_pair(
    engine: BlockEngine, where: str, default: Path, data_bytes: int | None, folders: Sequence[Path] = ()
) -> tuple[RowTable, bytes]:
    """The table of the slab that `engine` has open, without rows that are not valid, and the id that both have.

    `default` is the table's default path, `folders` where else it may lie. `data_bytes` is the slab's length before the
    engine allocated its space (None: not known): bytes beyond it are lost, and so are rows that name them. Rows beyond
    the engine's capacity stay in the table for a later open with more room. Raises SlabRefused or OSError; nothing is
    changed then.
    """
    page, place = read_page(engine, where), place_of(where)
    found = parse_header(page, where)
    if found is None:
        return _open_new(engine, where, place, default, data_bytes)
    at = find_table(default, found, place, folders) or _mendable(engine, where, default, found)
    aside = move_aside(at.path) if at.log_lost else None
    table = RowTable(at.path)
    try:
        if aside is not None:
            table.notes.append(f"the log of the table {at.path} was unreadable; moved to {aside}, the slab is empty")
        if at.path != default:
            table.notes.append(f"the table of {where} is {at.path}: it was made for another name of this slab")
        if table.identity is None and not at.rows:  # no row of a damaged table could be read, and it was moved aside
            table.start_empty(found)
        elif table.identity != found:
            table.notes.append(f"the id in {at.path} was damaged and is written again")
            table.take_over(found)
        table.remember_place(place)
        if page != pack_header(found):
            table.notes.append(f"the first page of {where} was damaged and is written again")
            write_header(engine, found, where)
        _drop_what_is_gone(table, where, data_bytes, engine.capacity_bytes)
    except BaseException:
        table.close()
        raise
    return table, found


def reset_slab(engine: BlockEngine, where: str, default: Path, folders: Sequence[Path] = ()) -> int:
    """Empty the slab that `engine` has open, and give it a new id; returns how many blocks were dropped (0 where its
    table is not found). Only for an operator's explicit command. Raises SlabRefused for a file that is no slab, or
    OSError."""
    place = place_of(where)
    found = parse_header(read_page(engine, where), where)
    if found is None:
        refuse_foreign_content(engine, where)
    at = find_table(default, found, place, folders) if found is not None else None
    identity, path = uuid.uuid4().bytes, at.path if at is not None else default
    expected = examine_table(default)
    if at is None and expected is not None and (expected.identity is not None or expected.foreign):
        path = _other_name(default, identity)
    table = RowTable(path)
    try:
        good, bad = table.read()
        forgotten = len(good) + len(bad)
        table.start_empty(identity)
        table.remember_place(place)
        write_header(engine, identity, where)
    finally:
        table.close()
    return forgotten


def _open_new(
    engine: BlockEngine, where: str, place: str, default: Path, data_bytes: int | None
) -> tuple[RowTable, bytes]:
    """Pair a slab without a header."""
    expected, identity = examine_table(default), uuid.uuid4().bytes
    path, note, proven = default, None, False
    taken = expected is not None and (expected.foreign or expected.identity is not None)
    if expected is not None and expected.identity is not None and expected.place in (None, place):
        unused = not expected.rows and expected.place == place
        proven = data_bytes != 0 and not unused and _names_what_is_there(engine, expected.path, where)
        if unused or proven:
            identity, taken = expected.identity, False
            note = None if unused else f"the first page of {where} was lost and is written again: its blocks are there"
    if taken:
        path = _other_name(default, identity)
        note = f"{default} is not the table of {where}, which is new; it is left alone, and {path} made"
    if expected is not None and expected.damaged and data_bytes != 0:
        proven = _proven(engine, readable_rows(default)[1], where)
    if not proven and data_bytes != 0:
        refuse_foreign_content(engine, where)
    table = RowTable(path)
    try:
        if note is not None:
            table.notes.append(note)
        if table.identity is not None and table.identity != identity:  # the id came from a damaged table
            identity = table.identity if proven else identity
        if table.identity != identity:
            table.start_empty(identity)
        table.remember_place(place)
        write_header(engine, identity, where)
        _drop_what_is_gone(table, where, data_bytes, engine.capacity_bytes)
    except BaseException:
        table.close()
        raise
    return table, identity


def _drop_what_is_gone(table: RowTable, where: str, data_bytes: int | None, capacity_bytes: int) -> None:
    good, bad = table.read()
    ends = ends_of(good)
    gone = ends > data_bytes if data_bytes is not None else np.zeros(len(good), bool)
    cut = keys_of(good[gone])
    if cut:
        table.notes.append(
            f"{where} was cut to {data_bytes} bytes: {len(cut)} of {len(good) + len(bad)} blocks dropped"
        )
    unused = int((ends > capacity_bytes).sum()) - len(cut)
    if unused > 0:
        table.notes.append(
            f"{where} is opened with {capacity_bytes} bytes: {unused} blocks beyond them are not used, and not dropped"
        )
    if bad:
        table.notes.append(f"{len(bad)} rows of {table.path} do not match their checksums: dropped")
    if cut or bad:
        table.change([*cut, *bad], [], [])
    table.opened = good[~gone & (ends <= capacity_bytes)]


def _mendable(engine: BlockEngine, where: str, default: Path, identity: bytes) -> TableFile:
    """The table at the default path, if it must belong to this slab although it does not name the slab's id: it cannot
    be read, or only its id is damaged. Raises SlabRefused otherwise."""
    expected = examine_table(default)
    if expected is not None:
        named = readable_rows(default)[0] if expected.damaged else expected.identity
        flipped = int.from_bytes(named) ^ int.from_bytes(identity) if named is not None else 0
        if named is not None and flipped.bit_count() <= FLIPPED_BITS_MAX:  # two random ids differ in about 64
            return expected
        if named is None and (expected.damaged or (expected.rows and _names_what_is_there(engine, default, where))):
            return expected
    raise SlabRefused(_missing_table(where, default, identity, expected))


def _missing_table(where: str, default: Path, identity: bytes, expected: TableFile | None) -> str:
    why, mend = f"its table {default} is missing", ""
    if expected is not None:
        why, mend = f"{default} is not its table", "`penstock pool check --repair` where both were damaged, "
    return (
        f"{where} is a slab (id {identity.hex()[:8]}), but {why}; nothing is changed. Allowed: the name or state "
        f"folder that it was filled under, {mend}or `penstock pool reset`, which makes it empty"
    )


def _other_name(default: Path, identity: bytes) -> Path:
    return default.with_name(f"{default.name.removesuffix('.db')}.{identity.hex()[:8]}.db")


def _tables_in(folders: Iterable[Path], but: Path) -> list[TableFile]:
    """Every table of these folders that can be read."""
    found = []
    for folder in dict.fromkeys(Path(os.path.realpath(folder)) for folder in folders):
        try:
            paths = sorted(folder.glob("*.db"))[:TABLES_MAX]
        except OSError:
            continue
        for path in paths:
            with contextlib.suppress(OSError):
                if not path.is_file() or (but.exists() and path.samefile(but)):
                    continue
                with open_stored(path) as file:
                    is_database = file.read(len(_SQLITE)) == _SQLITE
                table = examine_table(path) if is_database else None
                if table is not None:
                    found.append(table)
    return found


def _holds_slab(place: str, identity: bytes) -> bool:
    """Whether the slab with this id lies at `place`; False where that cannot be read."""
    try:
        with open_stored(Path(place)) as slab:
            return parse_header(slab.read(HEADER_BYTES), place) == identity
    except (OSError, ValueError):
        return False


def _same(one: str, other: str) -> bool:
    try:
        return device_of(Path(one)) == device_of(Path(other))
    except OSError:
        return False


def device_of(path: Path) -> tuple[str, int, int]:
    """Identity of a file or device: the same for all its names, by links, hard links or bind mounts. Raises OSError."""
    found = os.stat(path)
    if stat.S_ISBLK(found.st_mode) or stat.S_ISCHR(found.st_mode):
        return "device", found.st_mode & 0o170000, found.st_rdev
    return "file", found.st_dev, found.st_ino


def refuse_dangling_link(path: Path) -> None:
    """Raise OSError for a link that leads nowhere: its target may be absent only for now, so no slab is made there."""
    if path.is_symlink() and not os.path.exists(path):
        text = f"this is a link to {os.path.realpath(path)}, which does not exist; allowed: a link to a slab or device"
        raise FileNotFoundError(errno.ENOENT, text, str(path))


def _names_what_is_there(engine: BlockEngine, table: Path, where: str) -> bool:
    """Whether at least one block that a table names lies in the slab."""
    opened = RowTable(table)
    try:
        return _proven(engine, opened.read()[0], where)
    finally:
        opened.close()


def _proven(engine: BlockEngine, rows: StoredRows, where: str) -> bool:
    inside = rows[ends_of(rows) <= engine.capacity_bytes]
    for block, _ in stored_blocks(inside[:: max(1, len(inside) // PROOF_BLOCKS)][:PROOF_BLOCKS]):
        buffer = aligned_buffer(block.extent_bytes)
        with contextlib.suppress(OSError):
            transfer(engine, "read", block.offset, buffer, where)
            if block_checksum(block.key, buffer[: block.size_bytes]) == block.checksum:
                return True
    return False
