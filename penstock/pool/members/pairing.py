"""Brings a slab and its table together: the table is found by the id in the slab's header, whatever the slab is called.

PAIR-1  Nothing that holds blocks is emptied, moved or overwritten on the way: a slab whose table is not found is
        refused, and a table that belongs to another slab stays as it is.
PAIR-2  What has no header (none yet, or a first page of zeros) is given one where blocks prove that it is a slab, or
        where its first MiB has nothing but zeros. The table that its name leads to is taken over only when it is empty,
        or when blocks that it names are there.
Verification: tests/pool/setup/test_slab_names.py. The fault behind it: a symlink to a slab opened it as empty, wrote a
new header, and the slab's own name then dropped every block.
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

from penstock.io.api import BlockEngine
from penstock.io.memory import aligned_buffer
from penstock.pool.block import Block
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
from penstock.private_file import open_stored

TABLES_MAX = 4096  # in one folder that is looked through
PROOF_BLOCKS = 16
FLIPPED_BITS_MAX = 8  # between two ids that are one, damaged
_SQLITE = b"SQLite format 3\0"


@dataclass(frozen=True, slots=True)
class TableFile:
    """What a table file says of itself. `place`: where its slab was last opened. `damaged`: it cannot be read;
    `log_lost`: all that it had was in its log, which cannot be read; `foreign`: a database of something else.
    None of all: a table that no slab has yet."""

    path: Path
    identity: bytes | None = None
    place: str | None = None
    rows: bool = False
    damaged: bool = False
    log_lost: bool = False
    foreign: bool = False


def place_of(where: str) -> str:
    """One text for all names of a slab that are links to it."""
    return os.path.realpath(where) if os.path.exists(where) else where


def default_table(path: Path) -> Path:
    """Where the table of a slab file lies that has no folder for tables: beside the file that `path` leads to."""
    real = Path(os.path.realpath(path))
    return real.with_name(real.name + ".db")


def folders_of(path: Path) -> list[Path]:
    """Folders in which the table of a slab may lie by one of its names."""
    return list(dict.fromkeys([Path(os.path.realpath(path)).parent, Path(os.path.abspath(path)).parent]))


def look_at(path: Path) -> TableFile | None:
    """What a table file says of itself; None where there is none. Raises OSError where it cannot be opened."""
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
    """The table of the slab with this id: where it is expected, else any other of that folder or of `folders`; None
    when there is none. Raises SlabRefused where two could be meant, or where it is that of another slab, of which
    this one is a copy; OSError where the expected one cannot be opened."""
    expected = look_at(default)
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
    """The table of the slab that `engine` has open, and the id that both have; only with rows that can be trusted.

    `default` is where the table is expected, `folders` where else it may lie. `data_bytes` is how long the slab was
    before the engine gave it space (None: not known): rows beyond it name bytes that are gone. Rows beyond the engine
    stay in the table for a later open with more room. Raises SlabRefused or OSError; nothing is changed then.
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
        if table.identity is None and not at.rows:  # nothing of a damaged table could be read, and it lies aside now
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
    """Make the slab that `engine` has open an empty one, with a new id; returns how many blocks were forgotten (0 where
    its table is not found). Only ever on an operator's word. Raises SlabRefused for what is no slab, or OSError."""
    place = place_of(where)
    found = parse_header(read_page(engine, where), where)
    if found is None:
        refuse_foreign_content(engine, where)
    at = find_table(default, found, place, folders) if found is not None else None
    identity, path = uuid.uuid4().bytes, at.path if at is not None else default
    expected = look_at(default)
    if at is None and expected is not None and (expected.identity is not None or expected.foreign):
        path = _other_name(default, identity)
    table = RowTable(path)
    try:
        forgotten = sum(map(len, table.rows()))
        table.start_empty(identity)
        table.remember_place(place)
        write_header(engine, identity, where)
    finally:
        table.close()
    return forgotten


def _open_new(
    engine: BlockEngine, where: str, place: str, default: Path, data_bytes: int | None
) -> tuple[RowTable, bytes]:
    """A slab without a header."""
    expected, identity = look_at(default), uuid.uuid4().bytes
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
        proven = _proven(engine, [block for block, _ in readable_rows(default)[1]], where)
    if not proven and data_bytes != 0:
        refuse_foreign_content(engine, where)
    table = RowTable(path)
    try:
        if note is not None:
            table.notes.append(note)
        if table.identity is not None and table.identity != identity:  # read from a damaged one
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
    good, bad = table.rows()
    ends = [(block.key, block.offset + block.extent_bytes) for block, _ in good]
    cut = [key for key, end in ends if data_bytes is not None and end > data_bytes]
    if cut:
        table.notes.append(
            f"{where} was cut to {data_bytes} bytes: {len(cut)} of {len(good) + len(bad)} blocks dropped"
        )
    unused = sum(end > capacity_bytes for _, end in ends) - len(cut)
    if unused > 0:
        table.notes.append(
            f"{where} is opened with {capacity_bytes} bytes: {unused} blocks beyond them are not used, and not dropped"
        )
    if bad:
        table.notes.append(f"{len(bad)} rows of {table.path} do not match their checksums: dropped")
    if cut or bad:
        table.change([*cut, *bad], [], [])


def _mendable(engine: BlockEngine, where: str, default: Path, identity: bytes) -> TableFile:
    """The table where it is expected, which does not name the slab's id, but must be this slab's: it cannot be read, or
    only its id is damaged. Raises SlabRefused otherwise."""
    expected = look_at(default)
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
                table = look_at(path) if is_database else None
                if table is not None:
                    found.append(table)
    return found


def _holds_slab(place: str, identity: bytes) -> bool:
    """Whether the slab of this id lies at `place`, as far as that can be read."""
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
    """What is the same for all names of one file or device: links, hard links, bind mounts. Raises OSError."""
    found = os.stat(path)
    if stat.S_ISBLK(found.st_mode) or stat.S_ISCHR(found.st_mode):
        return "device", found.st_mode & 0o170000, found.st_rdev
    return "file", found.st_dev, found.st_ino


def refuse_dangling_link(path: Path) -> None:
    """A slab is not made through a link that leads nowhere: what it should lead to may only be absent at present."""
    if path.is_symlink() and not os.path.exists(path):
        text = f"this is a link to {os.path.realpath(path)}, which does not exist; allowed: a link to a slab or device"
        raise FileNotFoundError(errno.ENOENT, text, str(path))


def _names_what_is_there(engine: BlockEngine, table: Path, where: str) -> bool:
    """Whether a block that a table names lies in the slab."""
    opened = RowTable(table)
    try:
        return _proven(engine, [block for block, _ in opened.rows()[0]], where)
    finally:
        opened.close()


def _proven(engine: BlockEngine, blocks: list[Block], where: str) -> bool:
    inside = [block for block in blocks if block.offset + block.extent_bytes <= engine.capacity_bytes]
    for block in inside[:: max(1, len(inside) // PROOF_BLOCKS)][:PROOF_BLOCKS]:
        buffer = aligned_buffer(block.extent_bytes)
        with contextlib.suppress(OSError):
            transfer(engine, "read", block.offset, buffer, where)
            if block_checksum(block.key, buffer[: block.size_bytes]) == block.checksum:
                return True
    return False
