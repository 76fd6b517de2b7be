"""`penstock pool check` as a user runs it: by path or by configuration, damage found, and repaired by dropping."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from penstock.pool.setup.config_file import read_pool_config
from penstock.pool.setup.open import open_local_pool, open_members_pool
from penstock.pool.setup.pool_command import pool_app
from tests.pool.helpers import chain, read, write

TEXT = '[[member]]\nkind = "uring"\npath = "kv.slab"\ncapacity = "1MiB"\n'


def check(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(pool_app, ["check", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_damage_is_found_and_dropped(tmp_path: Path) -> None:
    file, slab = tmp_path / "pool.toml", tmp_path / "kv.slab"
    file.write_text(TEXT)
    pool = open_members_pool(read_pool_config(file))
    keys = chain("checked", 20)
    assert {write(pool, key, parent) for key, parent in keys} == {"ok"}
    pool.close(5.0)
    status, out, _ = check("--config", str(file))
    assert status == 0 and "20 rows" in out and "clean" in out
    with slab.open("r+b") as raw:
        raw.seek(3 * 4096 + 100)
        raw.write(b"damage")
    assert check(str(slab))[0] == check("--config", str(file))[0] == 1
    status, out, _ = check("--config", str(file), "--repair")
    assert status == 1 and "do not match their checksum: 1" in out
    assert check("--config", str(file))[0] == 0
    pool = open_members_pool(read_pool_config(file))
    assert sorted(read(pool, key) for key, _ in keys) == ["missing"] + ["ok"] * 19
    pool.close(5.0)


def test_tables_in_a_state_folder_are_found(tmp_path: Path) -> None:
    state = tmp_path / "tables"
    state.mkdir()
    pool = open_local_pool([], [(tmp_path / "kv.slab", 1 << 20)], state=state)
    ((key, parent),) = chain("state", 1)
    assert write(pool, key, parent) == "ok"
    pool.close(5.0)
    assert "1 rows" in check(str(tmp_path / "kv.slab"), "--state", str(state))[1]


def test_what_cannot_be_checked_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "pool.toml"
    file.write_text(TEXT)

    def refused(*arguments: str) -> str:
        status, out, err = check(*arguments)
        assert status == 2 and not out and len(err.splitlines()) == 1, (status, out, err)
        return err

    assert "either PATH or --config" in refused()
    assert "either PATH or --config" in refused(str(tmp_path), "--config", str(file))
    assert "no such slab" in refused("--config", str(file))
    pool = open_members_pool(read_pool_config(file))
    assert "already locked" in refused("--config", str(file))
    pool.close(5.0)
    file.write_text('[[member]]\nkind = "memory"\ncapacity = "1MiB"\n')
    assert "nothing to check" in refused("--config", str(file))
