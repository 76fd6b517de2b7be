"""`penstock pool check`: bits flipped in slab and table are all found, none served; repair drops exactly those."""

from __future__ import annotations

import contextlib
import random
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.io.open import open_engine
from penstock.pool.members.header import HEADER_BYTES, SlabRefused
from penstock.pool.setup.check import check_file, check_slab, print_report
from penstock.pool.setup.open import open_local_pool
from tests.pool.faulty_engine import FaultyEngine
from tests.pool.helpers import chain, key_of, read, write
from tests.pool.stored_tables import alter
from tests.pool.stored_tables import offsets as stored_offsets

MIB = 1 << 20
BLOCKS = 40
SIZE = 20_000
KEYS = [key for key, _ in chain("a", BLOCKS)]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slab of 2 MiB with 40 blocks, closed in order."""
    path = tmp_path_factory.mktemp("original") / "kv.slab"
    pool = open_local_pool([], [(path, 2 * MIB)])
    for key, parent in chain("a", BLOCKS):
        assert write(pool, key, parent, size_bytes=SIZE) == "ok"
    pool.close(5.0)
    return path


@pytest.fixture
def slab(original: Path, tmp_path: Path) -> Path:
    return copied(original, tmp_path)


def copied(original: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("kv.slab", "kv.slab.db"):
        shutil.copy(original.with_name(name), folder / name)
    return folder / "kv.slab"


def offsets(path: Path) -> dict[bytes, int]:
    return stored_offsets(Path(f"{path}.db"))


def flip(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def served(path: Path) -> dict[bytes, str]:
    """What reading every block gives; `read` fails on wrong bytes."""
    pool = open_local_pool([], [(path, 2 * MIB)])
    try:
        pool.check_integrity()
        return {key: read(pool, key, size_bytes=SIZE) for key in KEYS}
    finally:
        pool.close(5.0)


def test_a_sound_slab_is_clean(slab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int]] = []
    report = check_file(slab, on_progress=lambda done, of: seen.append((done, of)))
    assert report.clean and (report.rows, report.data_bytes) == (BLOCKS, BLOCKS * SIZE)
    extents = BLOCKS * 20480
    assert report.free_bytes == 2 * MIB - HEADER_BYTES - extents and seen[0] == (0, extents)
    assert seen[-1] == (extents, extents) and seen == sorted(seen)
    assert print_report(report) == 0 and capsys.readouterr().out.endswith("clean\n")


@pytest.mark.parametrize("seed", range(20))
def test_bits_flipped_in_a_slab_are_all_found_and_none_served(slab: Path, seed: int) -> None:
    """20 batches of 25: 500 places."""
    generator = random.Random(seed)
    places = offsets(slab)
    damaged = set(generator.sample(KEYS, 25))
    for key in damaged:
        flip(slab, places[key] + generator.randrange(SIZE), generator.randrange(8))
    report = check_file(slab)
    assert not report.clean and report.bad_data == 25 and report.dropped is None
    assert report.bad_rows + report.beyond + report.overlapping == 0
    assert served(slab) == {key: "checksum" if key in damaged else "ok" for key in KEYS}
    report = check_file(slab)
    assert report.clean and report.rows == BLOCKS - 25, "who reads them drops them too"


@pytest.fixture(scope="module")
def table_trials(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    folder = tmp_path_factory.mktemp("trials")
    yield [folder / str(number) for number in range(10)]


@pytest.mark.parametrize("batch", range(10))
def test_bits_flipped_in_a_table_are_found_or_change_nothing(
    original: Path, table_trials: list[Path], batch: int
) -> None:
    """10 batches of 10 tables with 5 places each: 500 places. A flip in bytes that SQLite does not use changes nothing;
    every other one is found by the check and by the pool alike, and no wrong byte is served."""
    generator = random.Random(1000 + batch)
    for number in range(10):
        slab = copied(original, table_trials[batch])
        table = slab.with_name("kv.slab.db")
        for _ in range(5):
            flip(table, generator.randrange(table.stat().st_size), generator.randrange(8))
        try:
            clean = check_file(slab).clean
        except OSError:  # refused: another format, for all that it says
            with pytest.raises(OSError, match=r"table|format"):
                open_local_pool([], [(slab, 2 * MIB)])
            continue
        outcomes = set(served(slab).values())
        assert outcomes <= {"ok", "missing"}, number
        assert clean == (outcomes == {"ok"}) or not clean, f"damage was not found: {number}"


def test_bits_flipped_in_the_log_of_a_table_serve_nothing_wrong(tmp_path: Path) -> None:
    """After a crash the last rows lie in SQLite's log, which has checksums of its own: what follows a flip is lost."""
    path = tmp_path / "live.slab"
    pool = open_local_pool([], [(path, 2 * MIB)])
    for key, parent in chain("a", BLOCKS):
        assert write(pool, key, parent, size_bytes=SIZE) == "ok"
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    for suffix in ("", ".db", ".db-wal"):
        shutil.copy(f"{path}{suffix}", crashed / f"kv.slab{suffix}")
    pool.close(5.0)
    generator = random.Random(5)
    for number in range(10):
        folder = tmp_path / f"log-{number}"
        shutil.copytree(crashed, folder)
        log = folder / "kv.slab.db-wal"
        for _ in range(3):
            flip(log, generator.randrange(log.stat().st_size), generator.randrange(8))
        assert set(served(folder / "kv.slab").values()) <= {"ok", "missing"}


def test_repair_drops_what_is_bad_and_nothing_else(slab: Path) -> None:
    places = offsets(slab)
    flip(slab, places[KEYS[0]] + 7, 0)
    alter(Path(f"{slab}.db"), lambda rows: rows.__setitem__("size", 19999), KEYS[1])
    report = check_file(slab, repair=True)
    assert (report.bad_data, report.bad_rows, report.dropped) == (1, 1, 2)
    assert print_report(report, lambda line: None) == 1
    report = check_file(slab)
    assert report.clean and report.rows == BLOCKS - 2
    assert list(served(slab).values()) == ["missing"] * 2 + ["ok"] * (BLOCKS - 2)


def test_repair_of_a_damaged_header_and_a_damaged_table(slab: Path) -> None:
    flip(slab, 3, 2)
    with pytest.raises(SlabRefused, match="not a Penstock slab"):
        open_local_pool([], [(slab, 2 * MIB)])
    report = check_file(slab, repair=True)
    assert report.header_damage is not None and report.bad_data == 0 and report.dropped == 0
    assert check_file(slab).clean and set(served(slab).values()) == {"ok"}
    flip(slab, 20, 1)
    assert "do not belong together" in str(check_file(slab, repair=True).header_damage)
    assert set(served(slab).values()) == {"ok"}
    slab.with_name("kv.slab.db").write_bytes(b"rubbish" * 4096)
    report = check_file(slab, repair=True)
    assert report.table_damage is not None
    assert check_file(slab).rows == 0


def test_a_slab_that_shrank_has_rows_outside(slab: Path) -> None:
    with slab.open("r+b") as file:
        file.truncate(HEADER_BYTES + 10 * 20480)
    report = check_file(slab)
    assert report.beyond == BLOCKS - 10 and report.bad_data == 0 and not report.clean
    assert slab.stat().st_size == HEADER_BYTES + 10 * 20480, "a check never grows a file"
    assert check_file(slab, repair=True).dropped == BLOCKS - 10
    assert check_file(slab).clean


def test_rows_over_each_other_are_told_apart_by_their_data(slab: Path) -> None:
    from penstock.pool.members.slab_index import RowTable

    table = RowTable(slab.with_name("kv.slab.db"))
    blocks = {block.key: (block, use) for block, use in table.rows()[0]}
    first, (second, use) = blocks[KEYS[0]][0], blocks[KEYS[1]]
    second.offset = first.offset + 4096
    table.change([], [(second, use)], [])
    table.close()
    report = check_file(slab, repair=True)
    assert (report.overlapping, report.bad_data, report.dropped) == (1, 1, 1)
    assert check_file(slab).clean and served(slab)[KEYS[0]] == "ok"


def test_blocks_that_the_device_does_not_give_are_counted(slab: Path) -> None:
    engine = FaultyEngine(open_engine(slab, 2 * MIB, 8), depth=4)
    failing = offsets(slab)[KEYS[5]]

    def submit(ops, inner=engine.submit):  # type: ignore[no-untyped-def]
        for op in ops:
            engine.fail = {"read"} if op.offset == failing else set()
            inner([op])

    engine.submit = submit  # type: ignore[method-assign]
    report = check_slab(engine, slab.with_name("kv.slab.db"))
    assert report.unreadable == 1 and report.bad_data == 0 and not report.clean
    engine.close(5.0)


def test_what_cannot_be_checked_is_refused_in_one_line(slab: Path, tmp_path: Path) -> None:
    pool = open_local_pool([], [(slab, 2 * MIB)])
    with pytest.raises(BlockingIOError, match="already locked"):
        check_file(slab)
    pool.close(5.0)
    with pytest.raises(FileNotFoundError, match="no such slab"):
        check_file(tmp_path / "absent")
    letters = tmp_path / "letters"
    letters.write_bytes(b"dear all".ljust(MIB, b"."))
    with pytest.raises(SlabRefused, match="not a Penstock slab"):
        check_file(letters, repair=True)
    assert letters.read_bytes()[:8] == b"dear all" and not (tmp_path / "letters.db").exists()
    with contextlib.closing(sqlite3.connect(f"{slab}.db")) as db, db:
        db.execute("UPDATE meta SET value = 9 WHERE name = 'format'")
    with pytest.raises(SlabRefused, match="format 9"):
        check_file(slab)
    assert key_of("a") not in KEYS
