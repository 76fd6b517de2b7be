"""Block engines over everything this machine has: files, a memory filesystem, a loop device, a frozen filesystem."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
from io_devices import loop_device, skip_without

from penstock.io import BlockEngine, open_engine
from penstock.io.ring import probe

FIFREEZE, FITHAW = 0xC0045877, 0xC0045878
ENGINES = ("uring", "threads", "threads-memory", "uring-loop", "threads-loop")

OpenOne = Callable[[int, int], BlockEngine]


@pytest.fixture
def skip_without_uring() -> None:
    reason = probe()
    if reason:
        pytest.skip(reason)


@pytest.fixture(params=ENGINES)
def engine_of(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenOne]:
    """Opens an engine of the kind under test; it is closed at the end."""
    kind, _, place = request.param.partition("-")
    prefer: Literal["uring", "threads"] = "uring" if kind == "uring" else "threads"
    if prefer == "uring":
        request.getfixturevalue("skip_without_uring")
    with contextlib.ExitStack() as stack:

        def open_one(capacity_bytes: int, depth: int) -> BlockEngine:
            if place == "loop":
                path = stack.enter_context(loop_device(tmp_path / "image", capacity_bytes))
            elif place == "memory":
                folder = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
                path = Path(folder) / "slab"
            else:
                path = tmp_path / "slab"
            engine = open_engine(path, capacity_bytes, depth, prefer)
            assert engine.name == prefer, engine.notes
            stack.callback(engine.close, 10.0)
            return engine

        yield open_one


class Frozen:
    """A mounted filesystem that can be made to hold back every write, as a dead disk would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._fd = os.open(folder, os.O_RDONLY)
        self._is_frozen = False

    def freeze(self) -> None:
        fcntl.ioctl(self._fd, FIFREEZE, 0)
        self._is_frozen = True

    def thaw(self) -> None:
        if self._is_frozen:
            fcntl.ioctl(self._fd, FITHAW, 0)
            self._is_frozen = False

    def close(self) -> None:
        self.thaw()
        os.close(self._fd)


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[Frozen]:
    skip_without("losetup", "mkfs.ext4", "mount", "umount")
    mount_point = tmp_path / "mounted"
    mount_point.mkdir()
    with loop_device(tmp_path / "disk", 16 << 20) as device:
        subprocess.run(["mkfs.ext4", "-q", str(device)], check=True)
        if subprocess.run(["mount", str(device), str(mount_point)]).returncode:
            pytest.skip("mounting is not allowed here")
        try:
            filesystem = Frozen(mount_point)
            try:
                yield filesystem
            finally:
                filesystem.close()
        finally:
            subprocess.run(["umount", str(mount_point)], check=True)
