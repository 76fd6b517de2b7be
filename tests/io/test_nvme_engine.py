"""`open_nvme` and what only the `nvme` engine has: what it refuses, faults of the drive, a drive that goes away."""

from __future__ import annotations

import errno
import fcntl
import os
import queue
import signal
import struct
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from penstock.core.keys import KEY_BYTES
from penstock.core.layout import staging_bytes
from penstock.core.new_block import NewBlock
from penstock.io import IoOp, aligned_buffer, open_engine, open_nvme
from penstock.io.ring_engine import RingEngine
from penstock.pool.api import Done, PoolError
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.members.device import open_device_member
from penstock.pool.members.header import SlabRefused
from tests.io import block_io
from tests.io.forked import forked
from tests.io.guest_drives import (
    FAULTY_OFFSET,
    ODD_BYTES,
    blank_namespace,
    block_device,
    controller,
    generic_device,
)
from tests.io.restricted import refuse_io_uring

pytestmark = pytest.mark.in_guest

MIB = 1 << 20
PAGE = 4096
BLKRRPART = 0x125F
GUEST_WAIT_S = 30.0  # the guest is emulated
drain, run = partial(block_io.drain, timeout_s=GUEST_WAIT_S), partial(block_io.run, timeout_s=GUEST_WAIT_S)


def test_the_whole_namespace_rounded_down() -> None:
    engine = open_nvme(generic_device("odd"), None, 2)
    assert engine.capacity_bytes == ODD_BYTES // PAGE * PAGE and engine.alignment_bytes == PAGE
    assert engine.name == "nvme" and engine.notes == []
    engine.close(1)


def test_bytes_lie_where_the_block_device_has_them() -> None:
    path = blank_namespace("lba4096", 4 * MIB)
    source = aligned_buffer(MIB + PAGE)
    source[:] = os.urandom(len(source))
    engine = open_nvme(path, 4 * MIB, 4)
    engine.register(source)
    assert run(engine, IoOp("write", 3 * PAGE, source, 1)) == {1: None}
    engine.sync()
    engine.close(1)
    raw = open_engine(block_device("lba4096"), 4 * MIB, 4)
    target = aligned_buffer(MIB + PAGE)
    assert run(raw, IoOp("read", 3 * PAGE, target, 1)) == {1: None}
    raw.close(1)
    assert target == source


def test_pieces_fit_the_device_and_registered_memory_is_used() -> None:
    for serial, limit_bytes in (("lba512", 512 << 10), ("lba4096", 128 << 10)):
        engine = open_nvme(generic_device(serial), None, 4)
        memory = aligned_buffer(4 * MIB)
        engine.register(memory)
        assert isinstance(engine, RingEngine) and engine.notes == []
        assert 64 << 10 <= engine.piece_bytes <= limit_bytes
        engine.close(1)


def test_a_second_engine_of_either_kind_is_refused_until_the_first_closes() -> None:
    path = generic_device("lba512")
    engine = open_nvme(path, None, 2)
    with pytest.raises(BlockingIOError, match="already locked"):
        open_nvme(path, None, 2)
    with pytest.raises(OSError, match="already locked"):
        open_engine(block_device("lba512"), MIB, 2)
    with pytest.raises(OSError) as caught:
        os.open(block_device("lba512"), os.O_RDWR | os.O_EXCL)
    assert caught.value.errno == errno.EBUSY
    engine.close(1)
    raw = open_engine(block_device("lba512"), MIB, 2)
    with pytest.raises(OSError, match="already locked"):
        open_nvme(path, None, 2)
    raw.close(1)
    open_nvme(path, None, 2).close(1)


def test_a_process_that_dies_leaves_no_lock() -> None:
    path = generic_device("lba512")

    def dies() -> str:
        engine = open_nvme(path, None, 2)
        os.kill(os.getpid(), signal.SIGKILL)
        return engine.name

    assert forked(dies) == (-signal.SIGKILL, "")
    deadline_s = time.monotonic() + 20
    while True:
        try:
            open_nvme(path, None, 2).close(1)
            break
        except BlockingIOError:  # the kernel ends the dead process's ring in the background
            assert time.monotonic() < deadline_s
            time.sleep(0.02)


def test_a_mounted_namespace_is_refused(tmp_path: Path) -> None:
    try:
        controller("mounted")
    except TimeoutError:
        pytest.skip("the guest's maker has no mkfs.ext4")
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    device, place = str(block_device("mounted")).encode(), str(tmp_path).encode()
    assert libc.mount(device, place, b"ext4", 1, None) == 0, os.strerror(ctypes.get_errno())
    try:
        with pytest.raises(OSError, match=r"in use, for example mounted") as caught:
            open_nvme(generic_device("mounted"), None, 2)
        assert caught.value.errno == errno.EBUSY
    finally:
        assert libc.umount2(place, 0) == 0
    open_nvme(generic_device("mounted"), None, 2).close(1)


def test_a_namespace_with_partitions_is_refused() -> None:
    path = blank_namespace("lba512", MIB)
    entry = struct.pack("<B3xB3xII", 0, 0x83, 2048, 2048)
    fd = os.open(block_device("lba512"), os.O_RDWR)
    os.pwrite(fd, bytes(446) + entry.ljust(64, b"\0") + b"\x55\xaa", 0)
    os.fsync(fd)
    fcntl.ioctl(fd, BLKRRPART)
    try:
        with pytest.raises(OSError, match=r"has partitions \(nvme\d+n1p1\)") as caught:
            open_nvme(path, None, 2)
        assert caught.value.errno == errno.EBUSY
    finally:
        os.pwrite(fd, bytes(512), 0)
        os.fsync(fd)
        fcntl.ioctl(fd, BLKRRPART)
        os.close(fd)
    open_nvme(path, None, 2).close(1)


@pytest.mark.parametrize(
    ("serial", "message"),
    [("metadata", "8 bytes of metadata per block"), ("zoned", "zoned namespace")],
)
def test_formats_without_support_are_refused(serial: str, message: str) -> None:
    with pytest.raises(OSError, match=message) as caught:
        open_nvme(generic_device(serial), None, 2)
    assert caught.value.errno == errno.EOPNOTSUPP


def test_a_namespace_smaller_than_the_capacity() -> None:
    with pytest.raises(OSError, match=f"has {ODD_BYTES} bytes, fewer than the capacity of 2097152") as caught:
        open_nvme(generic_device("odd"), 2 * MIB, 2)
    assert caught.value.errno == errno.ENOSPC


def test_wrong_paths(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such device"):
        open_nvme(Path("/dev/ng77n1"), None, 2)
    with pytest.raises(OSError, match="this is a block device; the nvme engine takes"):
        open_nvme(block_device("lba512"), None, 2)
    with pytest.raises(OSError, match="this is not the generic device"):
        open_nvme(Path("/dev/null"), None, 2)
    (tmp_path / "slab").write_bytes(b"")
    with pytest.raises(OSError, match="this is not a device"):
        open_nvme(tmp_path / "slab", None, 2)
    os.mknod(tmp_path / "gone", 0o600 | 0o020000, os.makedev(511, 7))
    with pytest.raises(OSError, match="this is not the generic device"):
        open_nvme(tmp_path / "gone", None, 2)


@pytest.mark.parametrize(("capacity_bytes", "depth"), [(0, 2), (PAGE + 1, 2), (MIB, 0), (MIB, 257)])
def test_wrong_arguments(capacity_bytes: int, depth: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        open_nvme(generic_device("lba512"), capacity_bytes, depth)
    open_nvme(generic_device("lba512"), None, 2).close(1)


@pytest.mark.slow
def test_no_permission() -> None:
    path = generic_device("lba512")

    def opened() -> str:
        os.setuid(1000)
        try:
            open_nvme(path, None, 2)
        except PermissionError as error:
            return str(error)
        return "opened"

    said = []
    for node in (path, block_device("lba512")):  # neither may be opened; one may; both may, but are not commanded
        said.append(forked(opened)[1])
        node.chmod(0o666)
    said.append(forked(opened)[1])
    for node in (path, block_device("lba512")):
        node.chmod(0o600)
    assert "needs root" in said[0] and "lock its block device" in said[1] and "needs root" in said[2], said


def test_an_address_beyond_the_namespace_is_an_error_in_words() -> None:
    """As after a namespace was shrunk while it was open."""
    engine = open_nvme(generic_device("odd"), None, 2)
    engine.capacity_bytes = 4 * MIB
    outcome = run(engine, IoOp("read", 2 * MIB, aligned_buffer(PAGE), "r"), IoOp("read", 0, aligned_buffer(PAGE), "ok"))
    engine.close(1)
    assert outcome["ok"] is None
    assert outcome["r"].errno == errno.EIO
    assert "address beyond the end of the namespace" in str(outcome["r"]) and "ng" in str(outcome["r"])


def test_a_drive_that_refuses_writes() -> None:
    engine = open_nvme(generic_device("readonly"), None, 2)
    outcome = run(engine, IoOp("write", 0, aligned_buffer(PAGE), "w"))
    assert outcome["w"].errno == errno.EIO and "NVMe status 0x" in str(outcome["w"])
    assert run(engine, IoOp("read", 0, aligned_buffer(PAGE), "r")) == {"r": None}
    engine.close(1)


def test_one_bad_sector_fails_its_operations_once_and_no_other() -> None:
    engine = open_nvme(generic_device("faulty"), None, 4)
    memory = aligned_buffer(4 * MIB)
    engine.register(memory)
    ops = [IoOp("read", at, memory[at : at + MIB], at) for at in range(0, 4 * MIB, MIB)]
    outcome = run(engine, *ops)
    assert {at for at, error in outcome.items() if error} == {FAULTY_OFFSET}
    assert "unrecovered read error" in str(outcome[FAULTY_OFFSET])
    bad = run(engine, IoOp("read", 0, memory, "all"))["all"]  # of many pieces
    assert bad is not None and bad.errno == errno.EIO
    assert run(engine, IoOp("read", 0, memory[:MIB], "good")) == {"good": None}
    engine.close(1)


def test_close_with_operations_in_flight_at_a_controller_reset() -> None:
    """The kernel ends what was in flight with or without an error; none is lost, and the drive works again."""
    engine = open_nvme(generic_device("slow"), None, 8)
    memory = aligned_buffer(2 * MIB)
    engine.submit([IoOp("write", n * MIB, memory[:MIB], n) for n in range(4)])
    (controller("slow") / "reset_controller").write_text("1")
    assert sorted(done.tag for done in drain(engine)) == [0, 1, 2, 3]
    assert run(engine, IoOp("read", 0, memory[:PAGE], "r")) == {"r": None}
    engine.close(10)


def test_a_drive_that_is_taken_away() -> None:
    """What is in flight ends, later operations fail, and close is clean."""
    path = generic_device("removed")
    engine = open_nvme(path, None, 64)
    memory = aligned_buffer(16 * MIB)
    engine.submit([IoOp("write", at, memory[at : at + 256 * 1024], at) for at in range(0, 16 * MIB, 256 * 1024)])
    pci = (controller("removed") / "device").resolve()
    (pci / "remove").write_text("1")
    assert len(drain(engine)) == 64
    error = run(engine, IoOp("read", 0, memory[:PAGE], "r"))["r"]
    assert error is not None
    with pytest.raises(OSError, match="flush"):
        engine.sync()
    engine.close(10)
    with pytest.raises(OSError):
        open_nvme(path, None, 2)
    Path("/sys/bus/pci/rescan").write_text("1")
    open_nvme(generic_device("removed"), None, 2).close(10)


def ended(start: Callable[[Done], None]) -> PoolError | None:
    """The outcome of a pool's `read` or `write`."""
    done: queue.SimpleQueue[PoolError | None] = queue.SimpleQueue()
    start(done.put)
    return done.get(timeout=30)


def test_a_pool_on_the_namespace_keeps_its_blocks(tmp_path: Path) -> None:
    path, size_bytes = blank_namespace("lba512", 64 * MIB), 300_000
    keys = [bytes([n + 1]) * KEY_BYTES for n in range(20)]
    data = aligned_buffer(20 * staging_bytes(size_bytes))
    data[:] = os.urandom(len(data))
    views = [data[at : at + staging_bytes(size_bytes)] for at in range(0, len(data), staging_bytes(size_bytes))]
    for opened in ("made", "found"):
        member = open_device_member("nvme0", str(path), open_nvme(path, 64 * MIB, 8), tmp_path / "table.db")
        pool = LocalPool([member], [1.0])
        pool.register(data)
        if opened == "made":
            for key, parent, view in zip(keys, [bytes(KEY_BYTES), *keys], views, strict=False):
                block = NewBlock(key, parent, size_bytes)
                assert ended(partial(pool.write, block, view, 20.0)) is None
        else:
            for key, view in zip(keys, views, strict=True):
                target = aligned_buffer(len(view))
                assert ended(partial(pool.read, key, size_bytes, target, 20.0)) is None
                assert target[:size_bytes] == view[:size_bytes]
        stat = pool.stat(5.0)
        assert stat.members[0].kind == "nvme" and stat.members[0].blocks == 20 and stat.members[0].errors == 0
        pool.close(20.0)


def test_a_pool_refuses_a_namespace_with_other_content(tmp_path: Path) -> None:
    path = blank_namespace("lba4096", 4 * MIB)
    page = aligned_buffer(PAGE)
    page[:] = b"somebody's data " * (PAGE // 16)
    engine = open_nvme(path, 4 * MIB, 2)
    assert run(engine, IoOp("write", 0, page, 1)) == {1: None}
    with pytest.raises(SlabRefused, match="not a Penstock slab"):
        open_device_member("nvme0", str(path), engine, tmp_path / "table.db")
    open_nvme(path, 4 * MIB, 2).close(1)  # the refusal let go of it


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EINVAL, "needs Linux 5.19 or later; this is"),
        (errno.ENOSYS, "seccomp profile"),
        (errno.EPERM, "forbidden"),
    ],
)
def test_a_kernel_without_passthrough(number: int, message: str) -> None:
    """io_uring_setup answers as such a kernel does; nothing stands in for the engine, and the namespace is let go."""
    path = generic_device("lba512")

    def opened() -> str:
        refuse_io_uring(number)
        said = []
        for _ in range(2):
            try:
                open_nvme(path, None, 2)
            except OSError as error:
                said.append(str(error))
        return "\n".join(said)

    ended, said = forked(opened)
    assert ended == 0 and said.count(message) == 2 and said.count(str(path)) == 2, said
