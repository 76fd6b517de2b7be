"""`open_engine`: what it picks, what it refuses, and what it says."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from penstock.io import IoOp, aligned_buffer, open_engine
from penstock.io.device import open_device
from tests.io.io_devices import loop_device

MIB = 1 << 20


def run_restricted(restriction: str, value: int, code: str) -> str:
    command = [sys.executable, str(Path(__file__).with_name("restricted.py")), restriction, str(value), "--", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_slab_keeps_its_content_and_grows(tmp_path: Path) -> None:
    path = tmp_path / "slab"
    page = aligned_buffer(4096)
    page[:] = os.urandom(4096)
    engine = open_engine(path, MIB, 2)
    engine.submit([IoOp("write", 0, page, 1)])
    assert engine.poll(10)[0].error is None
    engine.close(1)
    assert path.stat().st_size == MIB and path.stat().st_mode & 0o777 == 0o600
    engine = open_engine(path, 2 * MIB, 2)
    assert path.stat().st_size == 2 * MIB and path.stat().st_blocks * 512 >= 2 * MIB
    again = aligned_buffer(4096)
    engine.submit([IoOp("read", 0, again, 1)])
    assert engine.poll(10)[0].error is None and again == page
    engine.close(1)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM])
def test_falls_back_where_io_uring_is_refused(number: int, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from penstock.io import *
engine = open_engine(Path({str(tmp_path / "slab")!r}), 1 << 20, 4)
print(engine.name, engine.notes)
source, target = aligned_buffer(8192), aligned_buffer(8192)
source[:] = b"penstock" * 1024
for op in (IoOp("write", 4096, source, 1), IoOp("read", 4096, target, 2)):
    engine.submit([op])
    assert engine.poll(10)[0].error is None
assert source == target
engine.close(1)
"""
    said = run_restricted("no-uring", number, code)
    assert said.startswith("threads") and "instead of uring" in said
    assert ("no io_uring" if number == errno.ENOSYS else "io_uring_disabled") in said


def test_works_over_the_memory_lock_limit_and_says_so(skip_without_uring: None) -> None:
    code = """
import tempfile
from pathlib import Path
from penstock.io import *
with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
    engine = open_engine(Path(folder) / "slab", 16 << 20, 4)
    memory = aligned_buffer(16 << 20)
    engine.register(memory)
    engine.register(memory)
    memory[:] = b"penstock" * (2 << 20)
    engine.submit([IoOp("write", 0, memory, 1)])
    print(engine.name, engine.poll(10)[0].error, engine.notes)
    engine.close(1)
"""
    said = run_restricted("memlock", 1024, code)
    if said.startswith("threads"):
        pytest.skip(f"an ordinary user gets no io_uring here: {said}")
    assert said.startswith("uring None") and said.count("over the memory lock limit") == 1


def test_says_when_a_slab_lies_in_memory() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        engine = open_engine(Path(folder) / "slab", MIB, 2)
        assert engine.name == "threads"
        assert "tmpfs" in engine.notes[0] and "instead of uring" in engine.notes[1]
        engine.close(1)


def test_a_second_engine_is_refused_until_the_first_closes(tmp_path: Path) -> None:
    for prefer in ("uring", "threads"):
        engine = open_engine(tmp_path / "slab", MIB, 2, prefer)
        with pytest.raises(BlockingIOError, match="already locked"):
            open_engine(tmp_path / "slab", MIB, 2)
        engine.close(1)


def test_a_lock_of_another_process_counts(tmp_path: Path) -> None:
    path = tmp_path / "slab"
    path.write_bytes(b"")
    with path.open() as other:  # a lock belongs to the open file, not to the process
        fcntl.flock(other, fcntl.LOCK_SH)
        with pytest.raises(BlockingIOError, match="already locked"):
            open_engine(path, MIB, 2)
    assert path.exists()
    open_engine(path, MIB, 2).close(1)


def test_missing_folder_folder_and_special_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder .*absent does not exist"):
        open_engine(tmp_path / "absent" / "slab", MIB, 2)
    with pytest.raises(IsADirectoryError, match="this is a folder"):
        open_engine(tmp_path, MIB, 2)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        open_engine(tmp_path / "file" / "slab", MIB, 2)
    with pytest.raises(OSError, match="neither a regular file nor a block device"):
        open_engine(Path("/dev/null"), MIB, 2)


@pytest.mark.parametrize("level", ["file", "folder"])
def test_no_permission(tmp_path: Path, level: str) -> None:
    path = tmp_path / "slab"
    path.write_bytes(b"")
    (path if level == "file" else tmp_path).chmod(0)
    code = f"""
from pathlib import Path
from penstock.io import *
try:
    open_engine(Path({str(path)!r}), 1 << 20, 4)
except PermissionError as error:
    print(error)
"""
    try:
        assert "no permission" in run_restricted("memlock", 8192, code)
    finally:
        tmp_path.chmod(0o700)


def test_disk_full_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"no space for a slab of .* are free") as caught:
        open_engine(tmp_path / "slab", 1 << 60, 2)
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "slab").exists()


def test_a_refused_allocation_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "slab"
    path.write_bytes(b"kept")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, before[1]))
    try:
        with pytest.raises(OSError, match="ulimit -f") as caught:
            open_engine(path, 4 * MIB, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG and path.read_bytes() == b"kept"


def test_block_device_smaller_than_the_capacity(tmp_path: Path) -> None:
    with loop_device(tmp_path / "image", MIB) as device:
        with pytest.raises(OSError, match="has 1048576 bytes, fewer than the capacity of 2097152") as caught:
            open_engine(device, 2 * MIB, 2)
        assert caught.value.errno == errno.ENOSPC
        opened = open_device(device, MIB)
        assert opened.direct and 128 << 10 <= opened.piece_bytes <= MIB
        opened.close()


@pytest.mark.parametrize(
    ("capacity_bytes", "depth", "prefer", "message"),
    [
        (0, 2, "uring", "positive multiple of 4096"),
        (4097, 2, "uring", "positive multiple of 4096"),
        (MIB, 0, "uring", "depth is 0; it must be from 1 to 256"),
        (MIB, 257, "threads", "depth is 257"),
        (MIB, 2, "spdk", "prefer is 'spdk'"),
    ],
)
def test_wrong_arguments(tmp_path: Path, capacity_bytes: int, depth: int, prefer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_engine(tmp_path / "slab", capacity_bytes, depth, prefer)
    assert not (tmp_path / "slab").exists()
