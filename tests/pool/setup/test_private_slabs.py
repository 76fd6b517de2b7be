"""A slab and its table in a folder that other users can write to: everything is this user's alone, nothing planted is
taken over. Another user is a user id that root gives files to."""

from __future__ import annotations

import os
import re
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from penstock.pool.setup.open import open_local_pool
from penstock.pool.setup.pool_command import pool_app
from tests.pool.helpers import chain, read, write

MIB = 1 << 20
STRANGER = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user, which only root can")


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    yield folder


def modes(folder: Path) -> dict[str, int]:
    return {one.name: stat.S_IMODE(one.lstat().st_mode) for one in folder.iterdir()}


def refusal(slab: Path, state: Path | None = None) -> str:
    with pytest.raises(OSError) as caught:
        open_local_pool([], [(slab, MIB)], state=state).close(5.0)
    return str(caught.value)


def given_away(path: Path) -> Path:
    os.chown(path, STRANGER, STRANGER, follow_symlinks=False)
    return path


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_slab_table_log_and_index_are_private_under_any_umask(shared: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        pool = open_local_pool([], [(shared / "kv.slab", MIB)])
        assert [write(pool, key, parent) for key, parent in chain("a", 3)] == ["ok"] * 3
        found = modes(shared)
        pool.close(5.0)
    finally:
        os.umask(old)
    assert found == dict.fromkeys(("kv.slab", "kv.slab.db", "kv.slab.db-wal", "kv.slab.db-shm"), 0o600)


def test_what_an_older_version_left_open_is_narrowed_and_kept(shared: Path) -> None:
    slab, table = shared / "kv.slab", shared / "kv.slab.db"
    pool = open_local_pool([], [(slab, MIB)])
    ((key, parent),) = chain("a", 1)
    assert write(pool, key, parent) == "ok"
    pool.close(5.0)
    slab.chmod(0o666)
    table.chmod(0o644)
    pool = open_local_pool([], [(slab, MIB)])
    try:
        assert read(pool, key) == "ok"
        assert {name: mode for name, mode in modes(shared).items() if mode != 0o600} == {}
        assert f"{slab} was open to other users (mode 666); it has mode 600 now" in " ".join(pool.notes)
        assert f"{table} was open to other users (mode 644); it has mode 600 now" in " ".join(pool.notes)
    finally:
        pool.close(5.0)


@as_root
def test_a_link_that_another_user_planted_is_not_followed(shared: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    ours.write_bytes(b"")
    slab = shared / "kv.slab"
    slab.symlink_to(ours)
    given_away(slab)
    assert f"a symlink on the way to it belongs to user {STRANGER}" in refusal(slab)
    assert ours.stat().st_size == 0
    slab.unlink()
    table = shared / "kv.slab.db"
    table.symlink_to(ours)
    given_away(table)
    assert f"a symlink on the way to it belongs to user {STRANGER}" in refusal(slab)
    assert ours.stat().st_size == 0


@as_root
@pytest.mark.parametrize("name", ["kv.slab", "kv.slab.db"])
def test_a_file_of_another_user_is_not_taken_over(shared: Path, name: str) -> None:
    path = shared / name
    path.touch(0o600)
    given_away(path)
    assert f"belongs to user {STRANGER}" in refusal(shared / "kv.slab")
    assert path.stat().st_size == 0 and path.stat().st_uid == STRANGER


@as_root
@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
@pytest.mark.parametrize("kind", ["file", "link", "own link"])
def test_a_log_that_another_user_planted_beside_a_table_is_not_applied(shared: Path, suffix: str, kind: str) -> None:
    slab = shared / "kv.slab"
    open_local_pool([], [(slab, MIB)]).close(5.0)
    planted = shared / f"kv.slab.db{suffix}"
    planted.unlink(missing_ok=True)
    if kind == "file":
        planted.write_bytes(b"a journal of other rows")
    else:
        planted.symlink_to(slab)
    if kind != "own link":
        given_away(planted)
    why = rf"{re.escape(str(planted))} cannot be opened: .*(belongs to user|not a regular file)"
    assert re.search(why, refusal(slab))
    assert planted.is_symlink() or planted.read_bytes() == b"a journal of other rows"


@as_root
def test_a_table_of_another_user_does_not_stand_in_for_a_missing_one(shared: Path) -> None:
    """Not even one that names the slab's id, and it does not make two of one either."""
    slab, table = shared / "kv.slab", shared / "kv.slab.db"
    open_local_pool([], [(slab, MIB)]).close(5.0)
    planted = shared / "other.db"
    planted.write_bytes(table.read_bytes())
    given_away(planted)
    open_local_pool([], [(slab, MIB)]).close(5.0)
    table.unlink()
    assert "its table" in refusal(slab) and "is missing" in refusal(slab)


def test_a_table_that_names_a_pipe_as_its_slab_stops_nobody(shared: Path, tmp_path: Path) -> None:
    """Whoever could write the table: the place of its slab is only looked at where a file or device lies."""
    slab, table = shared / "kv.slab", shared / "kv.slab.db"
    open_local_pool([], [(slab, MIB)]).close(5.0)
    os.mkfifo(tmp_path / "pipe")
    with sqlite3.connect(table) as db:
        db.execute("UPDATE meta SET value = ? WHERE name = 'place'", (str(tmp_path / "pipe"),))
    db.close()
    table.rename(shared / "moved.db")
    open_local_pool([], [(slab, MIB)]).close(5.0)


@pytest.mark.parametrize("command", ["check", "reset"])
def test_commands_refuse_a_pipe_in_place_of_a_slab_at_once(tmp_path: Path, command: str) -> None:
    os.mkfifo(tmp_path / "kv.slab")
    done = CliRunner().invoke(pool_app, [command, str(tmp_path / "kv.slab")])
    assert done.exit_code == 2 and "neither a regular file nor a block device" in done.stderr


def test_a_folder_that_everybody_can_change_is_pointed_out(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    pool = open_local_pool([], [(tmp_path / "kv.slab", MIB)])
    notes = list(pool.notes)
    pool.close(5.0)
    assert any(f"every user can write to {tmp_path} (mode 777)" in note for note in notes)
