"""One slab under several names: it is found by the id in its header, or refused in one line; nothing is lost."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from penstock.core.config import ConfigError
from penstock.io.device import open_device
from penstock.pool.members.header import HEADER_BYTES, SlabRefused
from penstock.pool.setup.check import check_file
from penstock.pool.setup.open import open_local_pool
from penstock.pool.setup.pool_command import pool_app
from tests.pool.helpers import chain, read, write

MIB = 1 << 20
BLOCKS = 12


@pytest.fixture
def slab(tmp_path: Path) -> Path:
    """A slab with blocks, at its own path, its table beside it."""
    path = tmp_path / "real" / "kv.slab"
    path.parent.mkdir()
    fill(path, "a")
    return path


def fill(path: Path, name: str, state: Path | None = None, size: int = MIB) -> None:
    pool = open_local_pool([], [(path, size)], state=state)
    for position, (key, parent) in enumerate(chain(name, BLOCKS)):
        assert write(pool, key, parent, position=position) == "ok"
    pool.close(5.0)


def held(path: Path, name: str = "a", state: Path | None = None, size: int = MIB) -> int:
    """How many of the blocks that `fill` wrote the slab gives under this name."""
    pool = open_local_pool([], [(path, size)], state=state)
    try:
        pool.check_integrity()
        return [read(pool, key) for key, _ in chain(name, BLOCKS)].count("ok")
    finally:
        pool.close(5.0)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that a test is not to see changed; SQLite's shared memory and empty logs say nothing."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal")))
    return {str(path): path.read_bytes() for path in files}


def refusal(path: Path, state: Path | None = None, folder: Path | None = None, size: int = MIB) -> str:
    """The one line with which a name is refused; nothing in `folder` has changed then."""
    before = contents(folder) if folder is not None else {}
    with pytest.raises(OSError) as caught:
        open_local_pool([], [(path, size)], state=state)
    line = f"{caught.value.strerror or caught.value}: {caught.value.filename}"
    assert "\n" not in line
    assert folder is None or contents(folder) == before
    return line


# --- the same slab under another name is found ---


def test_a_link_to_a_slab_is_the_same_slab(slab: Path, tmp_path: Path) -> None:
    (tmp_path / "byid").mkdir()
    link = tmp_path / "byid" / "disk-A"
    link.symlink_to(slab)
    assert held(link) == BLOCKS
    fill(link, "b")
    assert held(slab) == BLOCKS and held(slab, "b") == BLOCKS
    assert sorted(path.name for path in tmp_path.rglob("*.db")) == ["kv.slab.db"]
    assert check_file(link).rows == 2 * BLOCKS and check_file(link).clean


def test_a_slab_that_was_filled_through_a_link_with_its_table_beside_the_link_is_found(
    slab: Path, tmp_path: Path
) -> None:
    """As the version before left it."""
    (tmp_path / "byid").mkdir()
    link = tmp_path / "byid" / "disk-A"
    link.symlink_to(slab)
    slab.with_name("kv.slab.db").rename(tmp_path / "byid" / "disk-A.db")
    assert held(link) == BLOCKS
    assert "its table" in refusal(slab, folder=tmp_path), "the slab's own name does not lead to the link's folder"


def test_an_alias_of_the_folder_is_the_same_slab_in_a_state_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    state = tmp_path / "state"
    state.mkdir()
    slab = tmp_path / "real" / "kv.slab"
    fill(slab, "a", state)
    (tmp_path / "nvme0").symlink_to(tmp_path / "real")
    assert held(tmp_path / "nvme0" / "kv.slab", state=state) == BLOCKS
    assert held(slab, state=state) == BLOCKS
    assert len(list(state.glob("*.db"))) == 1


def test_a_hard_link_is_the_same_slab_or_refused(slab: Path, tmp_path: Path) -> None:
    beside, elsewhere = slab.with_name("second.slab"), tmp_path / "elsewhere" / "kv.slab"
    elsewhere.parent.mkdir()
    os.link(slab, beside)
    os.link(slab, elsewhere)
    assert held(beside) == BLOCKS
    assert "its table" in refusal(elsewhere, folder=tmp_path)
    assert held(slab) == BLOCKS


def test_a_slab_with_its_table_beside_it_is_found_when_a_state_folder_is_named(slab: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    assert held(slab, state=state) == BLOCKS
    assert held(slab) == BLOCKS


def test_another_state_folder_is_refused_and_the_right_one_has_all_blocks(tmp_path: Path) -> None:
    slab, one, other = tmp_path / "kv.slab", tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    fill(slab, "a", one)
    assert "nothing is changed" in refusal(slab, other, tmp_path)
    line = refusal(slab, None, tmp_path)
    assert "state folder" in line and "penstock pool reset" in line and str(slab) in line
    assert held(slab, state=one) == BLOCKS


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts")
def test_another_mount_of_the_folder_is_the_same_slab(slab: Path, tmp_path: Path) -> None:
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    if subprocess.run(["mount", "--bind", str(slab.parent), str(mounted)], capture_output=True).returncode != 0:
        pytest.skip("this machine does not allow mounts")
    try:
        assert held(mounted / "kv.slab") == BLOCKS
        pool = open_local_pool([], [(slab, MIB)])
        with pytest.raises(BlockingIOError, match="already locked"):
            open_local_pool([], [(mounted / "kv.slab", MIB)])
        pool.close(5.0)
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_slabs_that_changed_names_keep_their_blocks(tmp_path: Path) -> None:
    """As kernel names of drives do over a reboot."""
    state, a, b = tmp_path / "state", tmp_path / "nvme0", tmp_path / "nvme1"
    state.mkdir()
    fill(a, "a", state)
    fill(b, "b", state)
    a.rename(tmp_path / "aside")
    b.rename(a)
    (tmp_path / "aside").rename(b)
    assert (held(a, "b", state), held(b, "a", state)) == (BLOCKS, BLOCKS)
    assert (held(a, "a", state), held(b, "b", state)) == (0, 0)


# --- two users of one slab ---


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_two_names_in_one_pool_are_refused(slab: Path, link: Callable[[Path, Path], None]) -> None:
    second = slab.with_name("second.slab")
    link(slab, second)
    with pytest.raises(ConfigError, match="two names of one slab"):
        open_local_pool([], [(slab, MIB), (second, MIB)])
    assert held(slab) == BLOCKS


def test_two_names_in_two_pools_are_refused(slab: Path) -> None:
    second = slab.with_name("second.slab")
    os.link(slab, second)
    pool = open_local_pool([], [(slab, MIB)])
    with pytest.raises(BlockingIOError, match="already locked"):
        open_local_pool([], [(second, MIB)])
    pool.close(5.0)
    assert held(second) == BLOCKS


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("losetup") is None, reason="a loop device")
def test_two_device_files_of_one_device_are_one_slab(tmp_path: Path) -> None:
    """As in two containers that were given one drive: a lock is of the device file, the claim is of the device."""
    image, other, state = tmp_path / "image", tmp_path / "other", tmp_path / "state"
    state.mkdir()
    image.write_bytes(bytes(MIB))
    made = subprocess.run(["losetup", "-f", "--show", str(image)], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    device = Path(made.stdout.strip())
    try:
        os.mknod(other, 0o600 | stat.S_IFBLK, device.stat().st_rdev)
        fill(device, "a", state)
        assert held(other, state=state) == BLOCKS
        with pytest.raises(ConfigError, match="two names of one slab"):
            open_local_pool([], [(device, MIB), (other, MIB)], state=state)
        pool = open_local_pool([], [(device, MIB)], state=state)
        try:
            with pytest.raises(BlockingIOError, match="in use"):
                open_local_pool([], [(other, MIB)], state=state)
        finally:
            pool.close(5.0)
        assert held(device, state=state) == BLOCKS
    finally:
        subprocess.run(["losetup", "-d", str(device)], check=False)


def test_a_copy_does_not_take_the_table_of_its_original(slab: Path) -> None:
    copy = slab.with_name("copy.slab")
    shutil.copy(slab, copy)
    assert "is a copy of the slab" in refusal(copy, folder=slab.parent)
    shutil.copy(slab.with_name("kv.slab.db"), slab.with_name("copy.slab.db"))
    assert held(copy) == BLOCKS == held(slab)


def test_two_paths_of_one_table_name_do_not_share_a_table(tmp_path: Path) -> None:
    """`/x/nvme0/kv.slab` and `/x/nvme0-kv.slab` give one name in a state folder."""
    state, one, other = tmp_path / "state", tmp_path / "nvme0" / "kv.slab", tmp_path / "nvme0-kv.slab"
    state.mkdir()
    one.parent.mkdir()
    fill(one, "a", state)
    fill(other, "b", state)
    assert (held(one, "a", state), held(other, "b", state)) == (BLOCKS, BLOCKS)
    assert len(list(state.glob("*.db"))) == 2


# --- missing or damaged metadata ---


def test_a_lost_table_is_refused_until_the_operator_resets_the_slab(slab: Path) -> None:
    slab.with_name("kv.slab.db").unlink()
    assert "kv.slab.db is missing" in refusal(slab, folder=slab.parent)
    result = CliRunner().invoke(pool_app, ["reset", str(slab)])
    assert result.exit_code == 0 and "empty now, 0 blocks" in result.stdout
    assert held(slab) == 0
    fill(slab, "b")
    assert held(slab, "b") == BLOCKS


def test_a_reset_forgets_what_the_table_names(slab: Path) -> None:
    assert "12 blocks forgotten" in CliRunner().invoke(pool_app, ["reset", str(slab)]).stdout
    assert held(slab) == 0 and check_file(slab).clean


def test_a_reset_of_what_is_open_unclear_or_no_slab_is_refused(slab: Path, tmp_path: Path) -> None:
    def status(*arguments: str) -> int:
        result = CliRunner().invoke(pool_app, ["reset", *arguments])
        assert len(result.stderr.splitlines()) == 1
        return result.exit_code

    pool = open_local_pool([], [(slab, MIB)])
    assert status(str(slab)) == 2
    pool.close(5.0)
    letters = tmp_path / "letters"
    letters.write_bytes(b"dear all".ljust(MIB))
    assert status(str(letters)) == status(str(tmp_path / "absent")) == status() == 2
    file = tmp_path / "pool.toml"
    file.write_text('[[member]]\nkind = "uring"\npath = "real/kv.slab"\ncapacity = "1MiB"\n')
    assert status("--config", str(file)) == status("--config", str(file), "--member", "ssd:7") == 2
    assert held(slab) == BLOCKS
    reset = CliRunner().invoke(pool_app, ["reset", "--config", str(file), "--member", "ssd:0"])
    assert reset.exit_code == 0 and held(slab) == 0


def test_a_slab_moved_without_its_table_is_refused_and_found_again_with_it(slab: Path, tmp_path: Path) -> None:
    moved = tmp_path / "kv2.slab"
    slab.rename(moved)
    assert "its table" in refusal(moved, folder=tmp_path)
    slab.with_name("kv.slab.db").rename(tmp_path / "any-name.db")
    assert held(moved) == BLOCKS


def test_a_new_slab_leaves_the_table_of_the_old_one_alone(slab: Path, tmp_path: Path) -> None:
    """The old slab comes back: a disk that was not mounted, or a file that was moved away."""
    away = tmp_path / "away.slab"
    slab.rename(away)
    assert held(slab) == 0
    fill(slab, "b")
    slab.rename(tmp_path / "second.slab")
    away.rename(slab)
    assert held(slab) == BLOCKS
    slab.unlink()
    (tmp_path / "second.slab").rename(slab)
    assert held(slab, "b") == BLOCKS


def test_a_header_of_zeros_is_written_again_where_the_blocks_are_there(slab: Path) -> None:
    with slab.open("r+b") as file:
        file.write(bytes(HEADER_BYTES))
    assert held(slab) == BLOCKS
    with slab.open("r+b") as file:
        file.write(bytes(MIB))  # as discarded: a new slab, empty
    assert held(slab) == 0
    fill(slab, "b")
    assert held(slab, "b") == BLOCKS


@pytest.mark.parametrize("where", ["header", "table", "table's name of it"])
def test_a_bit_flipped_in_an_id_loses_nothing(slab: Path, where: str) -> None:
    if where == "header":
        with slab.open("r+b") as file:
            file.seek(25)
            byte = file.read(1)[0]
            file.seek(25)
            file.write(bytes([byte ^ 8]))
    else:
        with sqlite3.connect(slab.with_name("kv.slab.db")) as db:
            (identity,) = db.execute("SELECT value FROM meta WHERE name = 'slab'").fetchone()
            changed = "value = ?" if where == "table" else "name = 'slac', value = ?"
            value = bytes([identity[0] ^ 1]) + identity[1:]
            db.execute(f"UPDATE meta SET {changed} WHERE name = 'slab'", (value,))
        db.close()
    assert held(slab) == BLOCKS
    assert check_file(slab).clean


def test_a_table_of_another_slab_in_its_place_is_refused_and_no_repair_drops_its_rows(
    slab: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other" / "kv.slab"
    other.parent.mkdir()
    fill(other, "b")
    table, kept = slab.with_name("kv.slab.db"), tmp_path / "kept"
    table.rename(kept)
    shutil.copy(other.with_name("kv.slab.db"), table)
    assert "is not its table" in refusal(slab, folder=tmp_path)
    report = check_file(slab, repair=True)
    assert report.dropped is None and not report.clean
    with sqlite3.connect(table) as db:
        assert db.execute("SELECT count(*) FROM blocks").fetchone() == (BLOCKS,)
    db.close()
    kept.replace(table)
    assert held(slab) == BLOCKS


def test_a_database_of_something_else_is_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "kv.slab.db"
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE letters (text)")
        db.execute("INSERT INTO letters VALUES ('dear all')")
    db.close()
    before = foreign.read_bytes()
    fill(tmp_path / "kv.slab", "a")
    assert held(tmp_path / "kv.slab") == BLOCKS and foreign.read_bytes() == before


def test_a_second_damaged_table_does_not_overwrite_the_first(slab: Path) -> None:
    table = slab.with_name("kv.slab.db")
    for number in (1, 2):
        table.write_bytes(random.Random(number).randbytes(8192))
        assert held(slab) == 0
    aside = sorted(path.name for path in slab.parent.iterdir() if "unreadable" in path.name)
    assert aside == ["kv.slab.db.unreadable", "kv.slab.db.unreadable-2"]


def test_a_smaller_size_hides_blocks_and_the_right_size_has_them_again(slab: Path) -> None:
    small = HEADER_BYTES + 4 * 4096
    assert held(slab, size=small) == 4
    assert held(slab) == BLOCKS
    assert check_file(slab).clean


def test_a_slab_smaller_than_its_blocks_takes_them_anew(slab: Path) -> None:
    small = HEADER_BYTES + 4 * 4096
    pool = open_local_pool([], [(slab, small)])
    (key, parent) = chain("a", BLOCKS)[-1]
    assert read(pool, key) == "missing" and write(pool, key, parent) == "ok" and read(pool, key) == "ok"
    pool.close(5.0)
    pool = open_local_pool([], [(slab, MIB)])
    pool.check_integrity()
    assert read(pool, key) == "ok"
    pool.close(5.0)


# --- links and folders that do not lead anywhere ---


def test_a_link_that_leads_nowhere_is_refused_and_nothing_is_made(tmp_path: Path) -> None:
    link = tmp_path / "dangling"
    for target in (tmp_path / "absent.slab", tmp_path / "nowhere" / "x.slab"):
        link.symlink_to(target)
        assert f"a link to {target}, which does not exist" in refusal(link, folder=tmp_path)
        assert not target.exists()
        link.unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts")
def test_read_only_folders_are_refused_in_one_line(slab: Path, tmp_path: Path) -> None:
    folder = tmp_path / "read-only"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "none", str(folder)]).returncode != 0:
        pytest.skip("this machine does not allow mounts")
    try:
        assert "read-only" in refusal(folder / "kv.slab")
        new = tmp_path / "new.slab"
        for state in (folder, folder / "st"):
            assert "cannot be opened" in refusal(new, state)
            assert held(slab, state=state) == BLOCKS, "its own table is found, beside it"
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_file_that_another_process_made_meanwhile_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the question whether a slab exists and its opening, another process may make and fill one."""
    path = tmp_path / "kv.slab"
    fill(path, "a")
    real = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda at: False if str(at) == str(path) else real(at))
    with pytest.raises(OSError):
        open_device(path, 1 << 60)  # fails once it is open: no disk has so much space
    monkeypatch.undo()
    assert held(path) == BLOCKS


def test_a_refusal_says_what_where_and_what_is_allowed(slab: Path) -> None:
    slab.with_name("kv.slab.db").unlink()
    with pytest.raises(SlabRefused, match=r"kv\.slab is a slab \(id [0-9a-f]{8}\), but its table .*Allowed: .*reset"):
        open_local_pool([], [(slab, MIB)])


@pytest.mark.parametrize(
    ("offset", "magic"), [(4096 + 24, b"\xc6\x85\x73\xf6"), (0x10040, b"_BHRfS_M"), ((1 << 20) - 8, b"anything")]
)
@pytest.mark.parametrize("empty_table", [False, True])
def test_what_only_has_zeros_in_its_first_page_is_left_alone(
    tmp_path: Path, offset: int, magic: bytes, empty_table: bool
) -> None:
    """A disk of bcache or btrfs was given a header, and filled, because its first page has zeros: the slab of that name
    had never been written to, or there was none."""
    disk = tmp_path / "disk.img"
    if empty_table:
        assert held(disk) == 0
        disk.unlink()
    content = bytearray(2 * MIB)
    content[offset : offset + len(magic)] = magic
    disk.write_bytes(content)
    before = contents(tmp_path)
    assert "other content in its first 1 MiB; nothing is changed" in refusal(disk)
    result = CliRunner().invoke(pool_app, ["reset", str(disk)])
    assert result.exit_code == 2 and "nothing is changed" in result.stderr
    assert contents(tmp_path) == before
