"""Memory that a peer gives: its size cannot change once it is mapped, and what could is refused."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from penstock.io.sealed_memory import check_sealed, create_sealed
from penstock.pool.api import PoolError
from penstock.pool.net.shared_memory import SharedMemoryMover
from penstock.vllm.link import Attach, LinkError, create_memory
from penstock.vllm.wire_checks import check_attach

SIZE = 1 << 16


@pytest.fixture
def sealed() -> Iterator[int]:
    fd = create_sealed("penstock-test", SIZE)
    yield fd
    os.close(fd)


@pytest.fixture(params=["no seals", "may shrink", "may grow", "may be unsealed", "a file", "a pipe"])
def unsealed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    """What has the right size, as far as it has any, and could lose it."""
    if request.param == "a file":
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, SIZE)
    elif request.param == "a pipe":
        fd, other = os.pipe()
        os.close(other)
    else:
        flags = os.MFD_CLOEXEC | (0 if request.param == "no seals" else os.MFD_ALLOW_SEALING)
        fd = os.memfd_create("penstock-test", flags)
        os.ftruncate(fd, SIZE)
        without = {
            "may shrink": fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL,
            "may grow": fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL,
            "may be unsealed": fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW,
        }
        if request.param in without:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, without[request.param])
    yield fd
    os.close(fd)


def described(mover: SharedMemoryMover, fd: int, size_bytes: int) -> bytes:
    """What a peer says that has `fd` open instead of memory of a mover's."""
    boot_id, processes, pid, *_ = msgspec.msgpack.decode(mover.export(mover.allocate(SIZE)))
    return msgspec.msgpack.encode([boot_id, processes, pid, fd, "penstock-test", size_bytes])


def test_the_size_of_sealed_memory_cannot_change(sealed: int) -> None:
    check_sealed(sealed, SIZE)
    for size in (0, SIZE // 2, 2 * SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(sealed, size)
    os.pwrite(sealed, b"its content can", 0)


def test_memory_of_another_size_or_user_is_refused(sealed: int) -> None:
    with pytest.raises(OSError, match=f"it has {SIZE} bytes, not {SIZE + 1}"):
        check_sealed(sealed, SIZE + 1)
    if os.geteuid() == 0:
        os.fchown(sealed, 65534, 65534)
        with pytest.raises(OSError, match="memory of user 65534"):
            check_sealed(sealed, SIZE)


def test_what_a_peer_could_make_shorter_is_refused(unsealed: int) -> None:
    with pytest.raises(OSError, match="not memory whose size is sealed"):
        check_sealed(unsealed, SIZE)


def test_a_mover_does_not_map_what_a_peer_could_make_shorter(unsealed: int) -> None:
    mover = SharedMemoryMover()
    with pytest.raises(PoolError, match=r"not memory whose size is sealed|does not have that memory"):
        mover.attach(described(mover, unsealed, SIZE))
    mover.close()


@pytest.mark.parametrize("size_bytes", [0, -1, 1 << 62])
def test_a_mover_refuses_sizes_that_are_none(size_bytes: int, sealed: int) -> None:
    mover = SharedMemoryMover()
    with pytest.raises(PoolError, match="cannot be attached"):
        mover.attach(described(mover, sealed, size_bytes))
    mover.close()


def test_a_reader_survives_an_owner_that_wants_its_memory_shorter() -> None:
    """In this process, which SIGBUS would end: prototype sb.py."""
    mover = SharedMemoryMover()
    memory = mover.allocate(SIZE)
    memory[:5] = b"bytes"
    remote = mover.attach(mover.export(memory))
    own = [one for one in Path("/proc/self/fd").iterdir() if one.exists() or one.is_symlink()]
    named = [int(one.name) for one in own if "penstock-" in os.readlink(one)]
    assert named
    for fd in named:
        with pytest.raises(OSError):  # sealed, or open for reading only
            os.ftruncate(fd, 0)
    into = memoryview(bytearray(SIZE))
    remote.read(0, into, 1.0)
    assert bytes(into[:5]) == b"bytes"
    remote.close()
    mover.close()


def test_vllms_staging_memory_is_sealed_and_nothing_else_is_taken_for_it(unsealed: int) -> None:
    descriptor, memory = create_memory(SIZE)
    attach = Attach(4, SIZE // 4, 0, [1])
    try:
        assert check_attach(attach, descriptor, [[64]]) == (attach, 64)
        with pytest.raises(LinkError, match="of staging memory: it has"):
            check_attach(Attach(3, SIZE // 4, 0, [1]), descriptor, [[64]])
        with pytest.raises(LinkError, match="of staging memory: it is not memory whose size is sealed"):
            check_attach(attach, unsealed, [[64]])
    finally:
        memory.close()
        os.close(descriptor)
