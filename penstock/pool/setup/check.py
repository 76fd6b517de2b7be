"""`penstock pool check`: every row of a slab's table against the bytes on the device; repairs by dropping rows."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.core.keys import BlockKey
from penstock.core.layout import STAGING_ALIGNMENT_BYTES
from penstock.io.api import BlockEngine, IoOp
from penstock.io.memory import aligned_buffer
from penstock.pool.block import Block
from penstock.pool.checksum import block_checksum
from penstock.pool.members.device import open_engine_patiently
from penstock.pool.members.header import (
    HEADER_BYTES,
    SlabRefused,
    pack_header,
    parse_header,
    read_page,
    write_header,
)
from penstock.pool.members.old_rows import OLD_FORMATS
from penstock.pool.members.pairing import default_table, find_table, folders_of, place_of
from penstock.pool.members.slab_index import (
    TABLE_FORMAT,
    RowTable,
    connect_read_only,
    damage_of,
    identity_of,
    meta_of,
    read_rows,
    readable_rows,
)
from penstock.pool.members.stored_rows import keys_of, stored_blocks
from penstock.private_file import open_stored
from penstock.units import format_bytes

DEPTH = 32
IN_FLIGHT_BYTES = 64 << 20
ANSWER_S = 30.0
Progress = Callable[[int, int], None]  # bytes read so far, bytes to read


@dataclass(slots=True)
class CheckReport:
    """The result of a check. Counts of rows that a repair drops: `bad_rows` do not match their own checksum, `beyond`
    lie outside the device, `overlapping` share bytes with another row, `bad_data` have blocks that do not match their
    checksum, `unreadable` have blocks that the device could not read."""

    where: str
    capacity_bytes: int
    rows: int = 0
    data_bytes: int = 0
    free_bytes: int = 0
    bad_rows: int = 0
    beyond: int = 0
    overlapping: int = 0
    bad_data: int = 0
    unreadable: int = 0
    table_damage: str | None = None
    header_damage: str | None = None
    dropped: int | None = None  # rows that a repair dropped; None without one

    @property
    def clean(self) -> bool:
        """Whether nothing damaged was found."""
        damaged = self.bad_rows or self.beyond or self.overlapping or self.bad_data or self.unreadable
        return not (damaged or self.table_damage or self.header_damage)

    def lines(self) -> list[str]:
        """The report as text."""
        free = f"{format_bytes(self.free_bytes)} free of {format_bytes(self.capacity_bytes)}"
        lines = [f"{self.where}: {self.rows} rows, {format_bytes(self.data_bytes)} of blocks, {free}"]
        if self.header_damage:
            lines.append(f"  header: {self.header_damage}")
        if self.table_damage:
            lines.append(f"  table: damaged ({self.table_damage})")
        for count, what in (
            (self.bad_rows, "rows that do not match their own checksum"),
            (self.beyond, "rows outside the device"),
            (self.overlapping, "rows that share bytes with another one"),
            (self.bad_data, "blocks that do not match their checksum"),
            (self.unreadable, "blocks that could not be read"),
        ):
            if count:
                lines.append(f"  {what}: {count}")
        if self.dropped is not None and not self.clean:
            lines.append(f"  rows dropped: {self.dropped}")
        lines.append("  clean" if self.clean else "  DAMAGED" if self.dropped is None else "  repaired")
        return lines


def print_report(report: CheckReport, show: Callable[[str], object] = print) -> int:
    """Show the report; returns the exit status: 0 clean, 1 damage found."""
    for line in report.lines():
        show(line)
    return 0 if report.clean else 1


def check_file(
    path: Path,
    table_path: Path | None = None,
    repair: bool = False,
    on_progress: Progress = lambda done, of: None,
) -> CheckReport:
    """`check_slab` of a whole slab file or block device, also of parts that a pool does not use. Never creates or grows
    a file. Raises OSError (absent, in use, no permission) or ValueError."""
    engine = open_whole_slab(path)
    try:
        return check_slab(engine, table_path or default_table(path), repair, on_progress, str(path), folders_of(path))
    finally:
        with contextlib.suppress(TimeoutError):
            engine.close(1.0)


def open_whole_slab(path: Path) -> BlockEngine:
    """Open the whole of an existing slab file or block device, without changing it, for one caller. Raises OSError
    (absent, in use, no permission, too small)."""
    if not os.path.exists(path):
        raise FileNotFoundError(errno.ENOENT, "there is no such slab", str(path))
    with open_stored(path) as slab:
        size_bytes = os.lseek(slab.fileno(), 0, os.SEEK_END)
    capacity_bytes = size_bytes - size_bytes % STAGING_ALIGNMENT_BYTES
    if capacity_bytes < HEADER_BYTES:
        raise SlabRefused(f"{path} is not a Penstock slab: it has {size_bytes} bytes")
    return open_engine_patiently(path, capacity_bytes, DEPTH, claims_space=False)


def check_slab(
    engine: BlockEngine,
    table_path: Path,
    repair: bool = False,
    on_progress: Progress = lambda done, of: None,
    where: str = "slab",
    folders: Sequence[Path] = (),
) -> CheckReport:
    """Verify a slab that no pool has open, through an engine that the caller owns: the header, each row against its own
    checksum, extents against the device and each other, each block's bytes against the row. Only `repair` changes
    anything: rows that fail are dropped, and a damaged table or header is rebuilt from the valid rows. The table is
    `table_path`, or the table of this slab that lies beside that or in `folders`.

    Raises SlabRefused (not a slab, other format), or OSError when the device or the table cannot be used at all.
    """
    report = CheckReport(where, engine.capacity_bytes)
    page = read_page(engine, where)
    identity, foreign = None, None
    try:
        identity = parse_header(page, where)
    except SlabRefused as error:
        foreign = error
    if identity is not None and (table := find_table(table_path, identity, place_of(where), folders)) is not None:
        table_path = table.path
    table_identity, good, doomed = _read_table(table_path, report)
    fits = [block for block in good if _inside(block, engine.capacity_bytes)]
    report.beyond = len(good) - len(fits)
    doomed += [block.key for block in good if not _inside(block, engine.capacity_bytes)]
    bad = set(_verify(engine, fits, report, on_progress))
    overlapping = _overlapping([block for block in fits if block.key not in bad])
    shared = _overlapping(fits)
    report.overlapping = len(shared)
    report.data_bytes = sum(block.size_bytes for block in fits)
    report.free_bytes = engine.capacity_bytes - HEADER_BYTES - _covered_bytes(fits)
    verified = len(fits) - len(bad)
    if foreign is not None and not verified:
        raise foreign  # nothing proves that this was ever a slab
    report.header_damage = _header_damage(page, identity, table_identity, foreign, len(good))
    theirs = table_identity is not None and table_identity != identity and not verified  # rows of another slab
    if repair and not report.clean and not theirs:
        report.dropped = _repair(table_path, {*doomed, *bad, *overlapping}, report)
        if table_identity is not None and verified and page != pack_header(table_identity):
            write_header(engine, table_identity, where)  # its blocks prove that slab and table belong together
    return report


def _read_table(path: Path, report: CheckReport) -> tuple[bytes | None, list[Block], list[Any]]:
    """The id in the table, its valid rows, and the keys of rows that are not valid."""
    if not path.exists():
        return None, [], []
    try:
        with contextlib.closing(connect_read_only(path)) as db:
            report.table_damage = damage_of(db)
            if report.table_damage is None:
                meta = meta_of(db)
                version = meta.get("format")
                if version not in (None, *OLD_FORMATS, TABLE_FORMAT):
                    raise SlabRefused(
                        f"{path} is a table of format {version}, this version reads formats 1 to {TABLE_FORMAT}"
                    )
                if not meta:
                    return None, [], []
                good, bad = read_rows(db)
                report.rows, report.bad_rows = len(good) + len(bad), len(bad)
                return identity_of(meta), [block for block, _ in stored_blocks(good)], bad
    except sqlite3.Error as error:
        raise OSError(f"the table {path} cannot be read: {error}") from error
    identity, kept = readable_rows(path)
    report.rows = len(kept)
    return identity, [block for block, _ in stored_blocks(kept)], []


def _header_damage(
    page: bytes, identity: bytes | None, table_identity: bytes | None, foreign: SlabRefused | None, rows: int
) -> str | None:
    if foreign is not None:
        return f"damaged: {foreign}"
    if identity is None:
        return "missing, though the table has rows" if rows else None
    if page != pack_header(identity):
        return "bytes of the first page changed"
    if table_identity is None:
        return "the table of this slab is missing"
    return None if table_identity == identity else "slab and table do not belong together"


def _inside(block: Block, capacity_bytes: int) -> bool:
    aligned = block.offset % STAGING_ALIGNMENT_BYTES == 0
    return (
        aligned
        and block.size_bytes > 0
        and block.offset >= HEADER_BYTES
        and block.offset + block.extent_bytes <= capacity_bytes
    )


def _overlapping(blocks: Iterable[Block]) -> list[BlockKey]:
    """Blocks that begin before an earlier one ends."""
    found, end = [], 0
    for block in sorted(blocks, key=lambda block: block.offset):
        if block.offset < end:
            found.append(block.key)
        end = max(end, block.offset + block.extent_bytes)
    return found


def _covered_bytes(blocks: Iterable[Block]) -> int:
    covered, end = 0, 0
    for block in sorted(blocks, key=lambda block: block.offset):
        begin, following = max(block.offset, end), block.offset + block.extent_bytes
        covered += max(0, following - begin)
        end = max(end, following)
    return covered


def _verify(engine: BlockEngine, blocks: list[Block], report: CheckReport, on_progress: Progress) -> Iterator[BlockKey]:
    """Read every block, many at the same time; yields the keys of those that fail."""
    todo = sorted(blocks, key=lambda block: block.offset, reverse=True)
    done, total = 0, sum(block.extent_bytes for block in blocks)
    spare: dict[int, list[memoryview]] = {}
    in_flight_bytes, answered_s = 0, time.monotonic()
    on_progress(0, total)
    while todo or engine.in_flight():
        while todo and engine.in_flight() < engine.depth:
            length = todo[-1].extent_bytes
            if in_flight_bytes and in_flight_bytes + length > IN_FLIGHT_BYTES:
                break
            buffers = spare.setdefault(length, [])
            buffer = buffers.pop() if buffers else aligned_buffer(length)
            block = todo.pop()
            engine.submit([IoOp("read", block.offset, buffer, (block, buffer))])
            in_flight_bytes += length
        for completion in engine.poll(1.0):
            block, buffer = completion.tag
            answered_s = time.monotonic()
            in_flight_bytes -= block.extent_bytes
            done += block.extent_bytes
            if completion.error is not None:
                report.unreadable += 1
                yield block.key
            elif block_checksum(block.key, buffer[: block.size_bytes]) != block.checksum:
                report.bad_data += 1
                yield block.key
            if len(spare) > DEPTH:  # many sizes occur: do not store buffers of all of them
                spare.clear()
            spare.setdefault(block.extent_bytes, []).append(buffer)
            on_progress(done, total)
        if time.monotonic() - answered_s > ANSWER_S:
            raise TimeoutError(errno.ETIMEDOUT, f"the device has not answered for {ANSWER_S:.0f} s", report.where)


def _repair(table_path: Path, doomed: set[Any], report: CheckReport) -> int:
    """Drop rows; opening a damaged table rebuilds it."""
    if not table_path.exists():
        return 0
    table = RowTable(table_path)
    try:
        stored, bad = table.read()
        keys = set(keys_of(stored)) & doomed
        table.change([*keys, *bad], [], [])
        return len(keys) + len(bad)
    finally:
        table.close()
