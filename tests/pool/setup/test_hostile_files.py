"""What lies in a slab, a table or a configuration was made up by somebody: a clear line or a report, in bounded memory.

Commands run in a process with little memory and processor time, as root would run them over files that came with a
disk.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.cluster.engine.serve_flags import read_flags
from penstock.core.config import ConfigError
from penstock.pool.block import Block
from penstock.pool.members.old_rows import block_of
from penstock.pool.members.stored_rows import packed, parts
from penstock.pool.setup.check import check_file
from penstock.pool.setup.config_file import read_pool_config
from penstock.pool.setup.open import open_local_pool
from penstock.pool.setup.profile import read_profile
from penstock.process.child_python import child_environment, python_command
from penstock.toml_file import TOML_BYTES_MAX
from tests.pool.helpers import chain, key_of, read, write
from tests.pool.stored_tables import old_row_of

MIB = 1 << 20
MEMORY_BYTES = 2 << 30  # of address space: the interpreter and its libraries take a good part of it
CPU_S = 60
KEYS = chain("hostile", 5)
_ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"
_EACH = ", ".join(["x"] * 13)
TABLES = {
    "endless rows": f"DROP TABLE blocks; CREATE VIEW blocks AS {_ENDLESS} SELECT {_EACH} FROM c",
    "endless rows, older": f"""DROP TABLE blocks; CREATE VIEW blocks AS {_ENDLESS} SELECT x, x, x, x, x, x, x FROM c;
        UPDATE meta SET value = 1 WHERE name = 'format'""",
    "endless names": f"DROP TABLE meta; CREATE VIEW meta AS {_ENDLESS} SELECT 'n' || x AS name, x AS value FROM c",
    "a huge value": """DROP TABLE blocks; CREATE TABLE blocks (key BLOB PRIMARY KEY, parent, offset, size, position,
        checksum, tenant, rebuild_s, row_check, used, uses, use_check) WITHOUT ROWID;
        INSERT INTO blocks VALUES (1, zeroblob(200000000), 1, 1, 1, 1, 1, 1, 1, 1, 1, 1)""",
    "a huge name": "INSERT INTO meta VALUES ('more', zeroblob(200000000))",
    "a trigger": "CREATE TRIGGER t AFTER DELETE ON blocks BEGIN DELETE FROM meta; END",
    "another table": "CREATE TABLE more (x)",
    "a table without columns of ours": "DROP TABLE blocks; CREATE TABLE blocks (x)",
    "a name that is no text": """INSERT INTO meta VALUES (x'ff00', 1);
        UPDATE meta SET value = x'ff' WHERE name = 'place'""",
    "a later format": "UPDATE meta SET value = 99 WHERE name = 'format'",
    "a format that is no number": "UPDATE meta SET value = zeroblob(1000) WHERE name = 'format'",
    "an id that is no id": "UPDATE meta SET value = 'id' WHERE name = 'slab'",
}


@pytest.fixture
def slab(tmp_path: Path) -> Path:
    path = tmp_path / "kv.slab"
    pool = open_local_pool([], [(path, MIB)])
    assert {write(pool, key, parent) for key, parent in KEYS} == {"ok"}
    pool.close(5.0)
    return path


LITTLE = f"""
import json, resource, sys
from typer.testing import CliRunner
from penstock.pool.setup.pool_command import pool_app
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_BYTES}, {MEMORY_BYTES}))
resource.setrlimit(resource.RLIMIT_CPU, ({CPU_S}, {CPU_S}))
answers = []
for words in json.loads(sys.argv[1]):
    done = CliRunner().invoke(pool_app, words)
    error = None if done.exception is None or isinstance(done.exception, SystemExit) else repr(done.exception)
    answers.append((words, done.exit_code, done.stdout, done.stderr, error))
print(json.dumps(answers))
"""


def commands(*words: list[str]) -> list[tuple[list[str], int, str, str]]:
    """What commands of `penstock pool` answer in one process with little memory and processor time; none may raise."""
    script = python_command("-c", LITTLE, json.dumps(words))
    done = subprocess.run(script, env=child_environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
    answers = json.loads(done.stdout)
    assert [answer for answer in answers if answer[4] is not None] == []
    return [tuple(answer[:4]) for answer in answers]


def change(slab: Path, script: str) -> None:
    with contextlib.closing(sqlite3.connect(f"{slab}.db")) as db:
        db.executescript(script)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


@pytest.mark.slow
def test_commands_over_made_up_tables_end_in_a_report_or_one_line(slab: Path, tmp_path: Path) -> None:
    words, slabs = [], {}
    for made_up, script in TABLES.items():
        one = slabs[made_up] = tmp_path / made_up / "kv.slab"
        one.parent.mkdir()
        for suffix in ("", ".db"):
            shutil.copy(f"{slab}{suffix}", f"{one}{suffix}")
        change(one, script)
        words += [["check", str(one)], ["check", str(one), "--repair"], ["reset", str(one)]]
    for asked, status, out, err in commands(*words):
        assert (status in (0, 1) and out) or (status == 2 and len(err.splitlines()) == 1), (asked, status, out, err)
    for made_up, one in slabs.items():
        if made_up != "a later format":  # which no command of this version touches
            pool = open_local_pool([], [(one, MIB)])  # empty now
            assert write(pool, *KEYS[0]) == "ok"
            pool.close(5.0)


@pytest.mark.parametrize("made_up", TABLES)
def test_a_made_up_table_is_opened_or_refused_in_one_line(slab: Path, made_up: str) -> None:
    change(slab, TABLES[made_up])
    try:
        pool = open_local_pool([], [(slab, MIB)])
    except OSError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert {read(pool, key) for key, _ in KEYS} <= {"ok", "missing"}
        pool.close(5.0)


def possible(**changes: object) -> tuple[object, ...]:
    """A row of format 3 whose checksums match, of a block that has these fields."""
    return old_row_of(changed(**changes), 1.0)


def changed(**changes: object) -> Block:
    block = Block(key_of("row"), key_of("parent"), 0, 4096, 4096, 0, 7, b"", 1.0, 1)
    for name, value in changes.items():
        setattr(block, name, value)
    return block


@pytest.mark.parametrize(
    "changes",
    [
        {"key": 7}, {"key": "k" * 16}, {"key": b"k" * 17}, {"parent": None}, {"parent": 1.5}, {"offset": -4096},
        {"offset": "4096"}, {"offset": 1.5}, {"size_bytes": 0}, {"size_bytes": -1}, {"size_bytes": (1 << 30) + 1},
        {"size_bytes": (1 << 62)}, {"position": -1}, {"position": "x"}, {"tenant": b"t"}, {"tenant": b"t" * 9},
        {"rebuild_s": math.inf}, {"rebuild_s": -1.0}, {"rebuild_s": 1e300}, {"uses": -1}, {"mac": bytes(31)},
        {"mac": 7},
    ],
)  # fmt: skip
def test_a_row_that_no_block_can_have_is_not_trusted_though_its_checksums_match(changes: dict[str, object]) -> None:
    assert block_of(possible()) is not None
    assert block_of(possible(**changes)) is None


def test_a_row_of_a_huge_block_in_a_huge_sparse_slab_takes_no_memory(tmp_path: Path, slab: Path) -> None:
    os.truncate(slab, 1 << 40)
    (row,) = parts(packed([(changed(size_bytes=(1 << 32) - 8192), 1.0)]))
    with contextlib.closing(sqlite3.connect(f"{slab}.db")) as db, db:
        db.execute(f"INSERT INTO blocks VALUES ({', '.join('?' * len(row))})", row)
    used_bytes = slab.stat().st_blocks * 512
    found = check_file(slab)
    assert (found.rows, found.bad_rows) == (6, 1)
    assert slab.stat().st_blocks * 512 == used_bytes, "the file's holes are not filled either"


@pytest.fixture
def damaged(slab: Path, tmp_path: Path) -> Iterator[list[Path]]:
    """Copies of a slab with its table, damaged at random places, each in a folder of its own."""
    dice, copies = random.Random(12), []
    for number in range(40):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in ("kv.slab", "kv.slab.db"):
            data = bytearray((tmp_path / name).read_bytes())
            if name == "kv.slab.db" or number % 3 == 0:
                for _ in range(dice.choice([1, 3, 50])):
                    data[dice.randrange(len(data) if dice.random() < 0.5 else 400)] = dice.randrange(256)
            if number % 7 == 0:
                del data[dice.randrange(len(data)) :]
            (folder / name).write_bytes(bytes(data))
        copies.append(folder / "kv.slab")
    yield copies


def test_random_damage_ends_in_a_report_or_one_line(damaged: list[Path]) -> None:
    reports = 0
    for slab in damaged:
        for repair in (False, True):
            try:
                report = check_file(slab, repair=repair)
            except (OSError, ValueError) as error:
                assert len(str(error).splitlines()) == 1
            else:
                assert report.lines()
                reports += 1
        shutil.rmtree(slab.parent)
    assert reports > 20


def deep(name: str) -> bytes:
    return f"{name} = {'[' * 100_000}{']' * 100_000}".encode()


NO_CONFIGURATION = [b"", b"#" * (TOML_BYTES_MAX + 1), deep("x"), b"\xff\xfe", b"\0" * 1000, b"x = 1\nx = 2"]


@pytest.mark.parametrize("text", NO_CONFIGURATION)
def test_a_configuration_that_is_none_is_one_line(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "pool.toml"
    file.write_bytes(text)
    for reader in (read_pool_config, lambda one: read_flags({}, one)):
        if not text and reader is not read_pool_config:
            continue
        with pytest.raises(ConfigError) as caught:
            reader(file)
        assert len(str(caught.value).splitlines()) == 1 and str(file) in str(caught.value)


def test_a_configuration_is_read_no_further_than_it_may_be_long(tmp_path: Path) -> None:
    """And a device that never ends is no configuration."""
    file = tmp_path / "pool.toml"
    file.touch()
    os.truncate(file, 1 << 40)
    for one in (file, Path("/dev/zero")):
        with pytest.raises(ConfigError, match=re.escape(f"more than the {TOML_BYTES_MAX} bytes")):
            read_pool_config(one)
    ((_, status, out, err),) = commands(["check", "--config", "/dev/zero"])
    assert status == 2 and not out and len(err.splitlines()) == 1


@pytest.mark.parametrize("text", [b"", b"[" * 100_000, b"{}", b"\xff", b'{"version": 1e400}'])
def test_a_profile_that_is_none_is_one_line(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "profile.json"
    file.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        read_profile(file)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ConfigError, match="more than"):
        read_profile(Path("/dev/zero"))
