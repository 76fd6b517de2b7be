"""Block engines over everything this machine has: files, a memory filesystem, a loop device, a frozen filesystem, and
emulated NVMe drives. What needs those runs in a guest; here each of its tests stands for its outcome there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Literal

import pytest

from penstock.io import BlockEngine, IoOp, aligned_buffer, open_engine, open_nvme
from penstock.io.ring import probe
from tests.io.guest_drives import blank_namespace, generic_device
from tests.io.guest_tests import GuestItem, report_guest_time, runs_in_guest
from tests.io.io_devices import loop_device, skip_without
from tests.io.spdk_rig import open_one as open_spdk_one

FIFREEZE, FITHAW = 0xC0045877, 0xC0045878
ENGINES = (
    "uring", "threads", "threads-memory", "uring-loop", "threads-loop", "nvme-lba512", "nvme-lba4096",
    "spdk-tcp", "spdk-pcie",
)  # fmt: skip
SLOW_WRITE_BYTES = 12 << 20  # six seconds
HELD = ("uring", "threads", "nvme")

OpenOne = Callable[[int, int], BlockEngine]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "in_guest: runs in the QEMU guest, as root, with the drives of guest_drives.py")


@pytest.hookimpl(tryfirst=True)  # and as the later one, before that of tests/conftest.py
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.pluginmanager.has_plugin("tests.io.guest_report"):  # it is there in the guest only
        items[:] = [
            GuestItem.from_parent(item.parent, name=item.name) if item.parent and runs_in_guest(item) else item
            for item in items
        ]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """As `report_guest_time`."""
    report = yield
    report_guest_time(item, report)
    return report


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
            if kind == "spdk":
                engine: BlockEngine = open_spdk_one(capacity_bytes, depth, place.upper())
                stack.callback(engine.close, 10.0)
                return engine
            if kind == "nvme":
                engine = open_nvme(blank_namespace(place, capacity_bytes), capacity_bytes, depth)
                stack.callback(engine.close, 10.0)
                return engine
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


class Held:
    """An engine whose device takes writes and does not end them until `release`."""

    def __init__(self, engine: BlockEngine, hold: Callable[[], None], release: Callable[[], None]) -> None:
        self.engine = engine
        self._hold = hold
        self.release = release

    def write(self, tag: object) -> None:
        """Start a write that stays in flight."""
        self._hold()
        self.engine.submit([IoOp("write", 0, aligned_buffer(self.engine.capacity_bytes), tag)])


@pytest.fixture(params=HELD)
def held(request: pytest.FixtureRequest) -> Iterator[Held]:
    """An engine of the kind under test on a device that can be held. The drive of the guest is slow rather than held:
    a write of all of it takes seconds."""
    if request.param == "nvme":
        engine = open_nvme(generic_device("slow"), SLOW_WRITE_BYTES, 4)
        yield Held(engine, lambda: None, lambda: None)
    else:
        if request.param == "uring":
            request.getfixturevalue("skip_without_uring")
        frozen = request.getfixturevalue("frozen")
        engine = open_engine(frozen.folder / "slab", 4 << 20, 4, request.param)
        yield Held(engine, frozen.freeze, frozen.thaw)
        frozen.thaw()
    engine.close(30.0)
