"""The table of a slab: rows with their own checksums, formats, salvage."""

from __future__ import annotations

import contextlib
import math
import random
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from penstock.core.keys import BlockKey
from penstock.pool.block import Block
from penstock.pool.checksum import block_checksum
from penstock.pool.members.header import HEADER_BYTES, SlabRefused, pack_header
from penstock.pool.members.old_rows import block_of
from penstock.pool.members.slab_index import RowTable
from penstock.pool.members.stored_rows import ROW, StoredRows, packed, row_checks, stored_blocks, use_checks, valid
from penstock.pool.setup.open import open_local_pool
from tests.pool.helpers import ROOT, block_bytes, chain, key_of, read, write
from tests.pool.stored_tables import alter, as_format_3, check_of, flipped, old_row_of

MIB = 1 << 20
ID = b"0123456789abcdef"


def block(name: object, offset: int = HEADER_BYTES) -> Block:
    made = Block(key_of(name), ROOT, 0, offset, 5000, 17, 0xFEDCBA9876543210)
    made.tenant, made.rebuild_s, made.uses = b"tenant-1", 0.125, 9
    made.mac = bytes(range(32))
    return made


def filled(path: Path, count: int) -> RowTable:
    table = RowTable(path)
    table.start_empty(ID)
    table.change([], [(block(i, HEADER_BYTES + 8192 * i), i / 4) for i in range(count)], [])
    return table


def test_a_row_comes_back_as_it_was(tmp_path: Path) -> None:
    table = filled(tmp_path / "t.db", 3)
    table.change([key_of(0)], [], [(key_of(1), 77.5, 12)])
    table.close()
    table = RowTable(tmp_path / "t.db")
    good, bad = table.rows()
    found = {b.key: (b, use) for b, use in good}
    assert table.identity == ID and not bad and not table.notes and set(found) == {key_of(1), key_of(2)}
    one, use = found[key_of(1)]
    assert (use, one.uses) == (77.5, 12)
    assert (one.parent, one.offset, one.size_bytes, one.position) == (ROOT, HEADER_BYTES + 8192, 5000, 17)
    assert (one.checksum, one.tenant, one.rebuild_s) == (0xFEDCBA9876543210, b"tenant-1", 0.125)
    assert one.mac == bytes(range(32))
    table.close()


def test_every_bit_of_a_row_counts() -> None:
    row = packed([(block("a"), 5.5)])
    assert valid(row).all() and stored_blocks(row)[0][0].mac == bytes(range(32))
    for bit in range(8 * ROW.itemsize):
        assert not valid(flipped(row, bit)).any(), bit


ODD_VALUES: dict[str, list[Any]] = {
    "size": [0, (1 << 30) + 1], "rebuild_s": [math.inf, math.nan, -1.0, 1e300], "tenant_bytes": [1, 9],
    "mac_bytes": [1, 31, 33], "worth": [math.inf, math.nan, -1.0, 1e300], "uses": [1 << 63],
    "offset": [1 << 62, (1 << 64) - 1],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, odd in ODD_VALUES.items() for value in odd])
def test_a_packed_row_whose_checks_match_and_that_says_nonsense_costs_itself(name: str, value: Any) -> None:
    """Whoever can write the table can make its checks: they are not keyed."""
    rows = packed([(block("good"), 5.5), (block("odd"), 6.5), (block("last"), 7.5)])
    rows[name][1] = value
    made_up = with_checks(rows)
    assert valid(made_up).tolist() == [True, False, True]


def test_a_row_of_another_length_or_type_costs_itself(tmp_path: Path) -> None:
    filled(tmp_path / "t.db", 6).close()
    changes = ["row = x'00'", "use = row", "row = 'text'", "use = zeroblob(100000)"]
    with contextlib.closing(sqlite3.connect(tmp_path / "t.db")) as db, db:
        for number, change in enumerate(changes):
            db.execute(f"UPDATE blocks SET {change} WHERE key = ?", (key_of(number),))
        db.execute("INSERT INTO blocks VALUES (7, 'a', 0.5)")
    table = RowTable(tmp_path / "t.db")
    good, bad = table.rows()
    assert {one.key for one, _ in good} == {key_of(4), key_of(5)}
    assert set(bad) == {7, *(key_of(number) for number in range(4))}
    table.change(bad, [], [])
    assert len(table.rows()[0]) == 2 and not table.rows()[1]
    table.close()


@pytest.mark.parametrize("column", range(13))
def test_every_bit_of_every_column_counts(column: int) -> None:
    row = list(old_row_of(block("a"), 5.5))
    assert block_of(tuple(row)) is not None
    value = row[column]
    if isinstance(value, bytes):
        others: list[object] = [value[:-1] + bytes([value[-1] ^ 1]), value[:-1], value + b"\0", value.hex(), None]
    else:
        others = [value + 1, -value, str(value), value.to_bytes(8) if isinstance(value, int) else int(value), None]
    for other in others:
        row[column] = other
        assert block_of(tuple(row)) is None, other
    assert block_of(tuple(row[:-1])) is None


ODD_COLUMNS: dict[str, list[Any]] = {
    "key": [b"k" * 15, "k" * 16, 7, None], "parent": [b"p" * 17, "p", None], "offset": [-4096, 0.5, None, "0"],
    "size": [0, -1, 1 << 63, "4096", 1.0], "position": [-1, None, 1e300], "checksum": [b"c" * 7, b"", "c" * 8],
    "tenant": [b"t" * 9, "tenant", None], "rebuild_s": [math.inf, -1.0, 1e300, "1", None, 1], "used": [math.inf, -1.0,
    "now", None, 1e300], "uses": [-1, 1.5, None],
}  # fmt: skip
COLUMNS = [
    "key",
    "parent",
    "offset",
    "size",
    "position",
    "checksum",
    "tenant",
    "rebuild_s",
    "row_check",
    "used",
    "uses",
]


@pytest.mark.parametrize(("column", "value"), [(name, value) for name, odd in ODD_COLUMNS.items() for value in odd])
def test_a_row_whose_checksums_match_and_that_says_nonsense_costs_itself(column: str, value: Any) -> None:
    """Whoever can write the table can make its checksums: they are not keyed."""
    good, odd = list(old_row_of(block("good"), 5.5)), list(old_row_of(block("odd"), 6.5))
    odd[COLUMNS.index(column)] = value
    odd[8] = check_of(tuple(odd[:8]))
    odd[11] = check_of((odd[0], odd[9], odd[10]))
    assert block_of(tuple(good)) is not None and block_of(tuple(odd)) is None
    if column not in ("offset", "size", "position"):
        return
    parent = odd[1]
    assert block_of((b"o" * 16, parent, *odd[2:6], 5)) is None, "as a row of format 1, which had no checksum"


def test_a_change_that_fails_changes_nothing(tmp_path: Path) -> None:
    table = filled(tmp_path / "t.db", 2)
    with contextlib.closing(sqlite3.connect(tmp_path / "t.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            table.change([key_of(0)], [(block("new"), 1.0)], [(key_of(1), 1.0, 2)])
    assert {b.key for b, _ in table.rows()[0]} == {key_of(0), key_of(1)}
    table.close()


def test_a_row_that_the_table_refuses_costs_itself_only(tmp_path: Path) -> None:
    table = filled(tmp_path / "t.db", 3)
    not_a_number, too_large, negative = block("nan"), block("large"), block("negative")
    not_a_number.rebuild_s, too_large.position, negative.checksum = float("nan"), 1 << 70, -1
    rows = [(made, 1.0) for made in (block("a"), not_a_number, too_large, negative, block("b"))]
    refused = table.change([key_of(0)], rows, [(key_of(1), 1.0, 1 << 70), (key_of(2), 9.0, 2)])
    assert {key for key, _ in refused} == {not_a_number.key, too_large.key, negative.key, key_of(1)}
    assert all(why for _, why in refused)
    good, bad = table.rows()
    assert {b.key for b, _ in good} == {key_of("a"), key_of("b"), key_of(1), key_of(2)} and not bad
    assert {b.key: b.uses for b, _ in good}[key_of(2)] == 2
    table.close()


def with_checks(rows: StoredRows) -> StoredRows:
    rows["row_check"], rows["use_check"] = row_checks(rows), use_checks(rows)
    return rows


def damage_pages(path: Path, pages: list[int]) -> None:
    with path.open("r+b") as file:
        for page in pages:
            file.seek(page * 4096)
            file.write(random.Random(page).randbytes(4096))


def test_the_rows_of_a_damaged_table_that_can_be_read_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    filled(path, 2000).close()
    pages = path.stat().st_size // 4096
    damage_pages(path, [pages // 2])
    table = RowTable(path)
    good, bad = table.rows()
    assert table.identity == ID and not bad
    assert 1000 < len(good) < 2000 and all(b.tenant == b"tenant-1" for b, _ in good)
    assert "can still be read" in table.notes[0] and path.with_name("t.db.unreadable").exists()
    table.change([], [(block("new"), 1.0)], [])
    table.close()
    table = RowTable(path)
    assert not table.notes and len(table.rows()[0]) == len(good) + 1
    table.close()


def test_a_table_of_rubbish_is_moved_aside_with_its_log(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    filled(path, 50).close()
    path.write_bytes(b"rubbish" * 5000)
    path.with_name("t.db-wal").write_bytes(b"more rubbish" * 5000)
    table = RowTable(path)
    assert table.rows() == ([], []) and table.identity is None and "the slab is empty" in table.notes[-1]
    table.change([], [(block("new"), 1.0)], [])
    table.close()
    table = RowTable(path)
    assert len(table.rows()[0]) == 1 and not table.notes
    table.close()


FORMAT_1 = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE blocks (key BLOB PRIMARY KEY, parent BLOB NOT NULL, offset INTEGER NOT NULL, size INTEGER NOT NULL,
position INTEGER NOT NULL, checksum BLOB NOT NULL, used INTEGER NOT NULL) WITHOUT ROWID;
"""


def make_format_1(path: Path, blocks: list[tuple[BlockKey, BlockKey]], size: int) -> None:
    """A slab with its table as the version before wrote them."""
    slab, rows = bytearray(pack_header(ID)), []
    for number, (key, parent) in enumerate(blocks):
        data = block_bytes(key, size)
        check = block_checksum(key, memoryview(data)).to_bytes(8, "little")
        rows.append((key, parent, len(slab), size, number, check, 10 + number))
        slab += data.ljust(-(-size // 4096) * 4096, b"\0")
    path.write_bytes(bytes(slab).ljust(MIB, b"\0"))
    with contextlib.closing(sqlite3.connect(f"{path}.db")) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(FORMAT_1)
        with db:
            db.executemany("INSERT INTO meta VALUES (?, ?)", [("format", 1), ("slab", ID)])
            db.executemany("INSERT INTO blocks VALUES (?, ?, ?, ?, ?, ?, ?)", rows)


def test_a_slab_of_format_1_is_upgraded_and_keeps_its_blocks(tmp_path: Path) -> None:
    path = tmp_path / "kv.slab"
    make_format_1(path, chain("a", 12), 9000)
    for round_ in range(2):
        pool = open_local_pool([], [(path, MIB)])
        assert ("was of format 1" in " ".join(pool.notes)) == (round_ == 0)
        assert [read(pool, key, size_bytes=9000) for key, _ in chain("a", 12)] == ["ok"] * 12
        pool.check_integrity()
        pool.close(5.0)
    pool = open_local_pool([], [(path, MIB)])
    for key, parent in chain("b", 5):
        assert write(pool, key, parent, size_bytes=9000) == "ok"
    pool.close(5.0)


def test_a_table_of_format_3_is_converted_with_all_that_it_says(tmp_path: Path) -> None:
    path = tmp_path / "kv.slab"
    pool = open_local_pool([], [(path, MIB)])
    for position, (key, parent) in enumerate(chain("a", 40)):
        assert write(pool, key, parent, 4096 + position, position=position, tenant="t", rebuild_s=0.25) == "ok"
    pool.lookup([key for key, _ in chain("a", 20)], 1.0)
    pool.close(5.0)
    table = RowTable(Path(f"{path}.db"))
    before = sorted(row.tobytes() for row in table.read()[0])
    table.close()
    assert as_format_3(Path(f"{path}.db")) == 40
    pool = open_local_pool([], [(path, MIB)])
    assert "was of format 3 and is of format 4 now" in " ".join(pool.notes)
    pool.check_integrity()
    pool.close(5.0)
    table = RowTable(Path(f"{path}.db"))
    assert sorted(row.tobytes() for row in table.read()[0]) == before
    table.close()
    pool = open_local_pool([], [(path, MIB)])
    assert not pool.notes
    assert [read(pool, key, 4096 + at) for at, (key, _) in enumerate(chain("a", 40))] == ["ok"] * 40
    pool.close(5.0)


def test_a_conversion_that_is_interrupted_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.db"
    filled(path, 30).close()
    assert as_format_3(path) == 30

    def broken(rows: object) -> list[object]:
        raise OSError("the disk is full")

    monkeypatch.setattr("penstock.pool.members.slab_index.parts", broken)
    with pytest.raises(OSError, match="disk is full"):
        RowTable(path)
    monkeypatch.undo()
    table = RowTable(path)
    assert len(table.rows()[0]) == 30 and table.identity == ID and "was of format 3" in table.notes[0]
    table.close()


def test_a_table_of_a_later_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    filled(path, 3).close()
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE meta SET value = 5 WHERE name = 'format'")
    before = path.read_bytes()
    with pytest.raises(SlabRefused, match="a table of format 5, this version reads format 4"):
        RowTable(path)
    assert path.read_bytes() == before


def test_bad_rows_are_dropped_with_a_note_and_their_space_is_free(tmp_path: Path) -> None:
    path = tmp_path / "kv.slab"
    pool = open_local_pool([], [(path, MIB)])
    keys = [key for key, _ in chain("a", 10)]
    for key, parent in chain("a", 10):
        assert write(pool, key, parent) == "ok"
    pool.close(5.0)
    for key, (name, value) in zip(
        keys, [("parent", 0), ("offset", 40960), ("size", 4095), ("position", 839), ("uses", 4000)], strict=False
    ):
        alter(Path(f"{path}.db"), lambda rows, name=name, value=value: rows.__setitem__(name, value), key)  # type: ignore[misc]
    pool = open_local_pool([], [(path, MIB)])
    assert "5 rows of" in " ".join(pool.notes)
    assert [read(pool, key) for key in keys] == ["missing"] * 5 + ["ok"] * 5
    assert pool.stat(1.0).members[0].used_bytes == 5 * 4096
    pool.close(5.0)
    pool = open_local_pool([], [(path, MIB)])
    assert not pool.notes
    pool.close(5.0)
