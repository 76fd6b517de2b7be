"""A slab file or block device: opens, sizes and locks it, and finds out which direct I/O it supports."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from penstock.core.layout import STAGING_ALIGNMENT_BYTES
from penstock.private_file import NotPrivate, make_private, narrow, open_own

_MEMORY_FILESYSTEMS = {0x01021994: "tmpfs", 0x858458F6: "ramfs"}
# The filesystem splits a file's transfer itself, so large pieces are cheapest. A block device cannot split one without
# blocking (above 1 MiB, or its queue's limit), which moves it to io_uring's slow path with helper threads.
_FILE_PIECE_BYTES = 2 << 20
_BLOCK_DEVICE_PIECE_BYTES = 1 << 20
_PIECE_BYTES_MIN = 128 << 10


@dataclass(slots=True)
class Device:
    """An open device. `direct`: I/O bypasses the page cache. `piece_bytes`: the best size of one transfer."""

    path: Path
    fd: int
    capacity_bytes: int
    direct: bool
    piece_bytes: int
    notes: list[str] = field(default_factory=list)

    def close(self) -> None:
        """Release the lock at once, even if the open file has other references, and close the file."""
        fcntl.flock(self.fd, fcntl.LOCK_UN)
        os.close(self.fd)


def open_device(path: Path, capacity_bytes: int, claims_space: bool = True) -> Device:
    """Open `path` for reading and writing. A missing file is created; the space of `capacity_bytes` is allocated for a
    file now, so that no later write finds the disk full; its content is unchanged. If other users have access to a
    file, that is removed; a file of another user, or behind such a user's symlink, is refused (FILE-1, FILE-2). Without
    `claims_space` no space is allocated, and the file may have holes.

    Raises ValueError for a bad capacity, OSError with the reason for everything else.
    """
    if capacity_bytes < 1 or capacity_bytes % STAGING_ALIGNMENT_BYTES:
        raise ValueError(
            f"capacity_bytes is {capacity_bytes}; it must be a positive multiple of {STAGING_ALIGNMENT_BYTES}"
        )
    fd, direct, created = _open(path)
    try:
        _lock(fd, path)
        wider = narrow(fd, path) if stat.S_ISREG(os.fstat(fd).st_mode) else None
        if claims_space:
            _claim_space(fd, path, capacity_bytes)
        device = Device(path, fd, capacity_bytes, direct, _piece_bytes(os.fstat(fd)))
        device.notes += [wider] if wider else []
        filesystem = None if path.is_block_device() else _MEMORY_FILESYSTEMS.get(_filesystem_magic(fd))
        if filesystem:
            device.direct = False
            device.notes.append(f"{path} is on {filesystem}: it lies in memory, and no block survives a reboot")
        elif not direct:
            device.notes.append(f"the filesystem of {path} refuses O_DIRECT: bytes pass through the page cache")
        return device
    except BaseException as error:
        if created and not isinstance(
            error, BlockingIOError
        ):  # under our lock: no other process can have begun to use it
            with contextlib.suppress(OSError):
                path.unlink()
        os.close(fd)
        raise


def _open(path: Path) -> tuple[int, bool, bool]:
    """The open file, whether I/O bypasses the page cache, and whether this call made the file."""
    flags = os.O_RDWR
    created = False
    try:
        if not os.path.exists(path):  # unlike Path.exists, no error for a folder without permission
            with contextlib.suppress(FileExistsError):  # another process has just made it
                os.close(make_private(path))
                created = True
        if path.is_block_device():
            flags |= os.O_EXCL  # locks one device file; O_EXCL excludes other users of the device, such as a mount
        try:
            return open_own(path, flags | os.O_DIRECT), True, created
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return open_own(path, flags), False, created
    except NotPrivate:
        raise
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise in_use(path, "the device is in use: mounted, or by another process", path) from error
        raise _explained(error, path) from error


def in_use(path: Path, otherwise: str, named: Path) -> BlockingIOError:
    """The error that the block device at `path` cannot be claimed: a Penstock process has locked it, or `otherwise`;
    `named` is the path in the error. The kernel releases the claim of a killed process a moment later."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _lock(fd, path)
        except BlockingIOError as error:
            return error
        finally:
            os.close(fd)
    return BlockingIOError(errno.EBUSY, otherwise, str(named))


def _explained(error: OSError, path: Path) -> OSError:
    number = error.errno or errno.EIO
    texts = {
        errno.ENOENT: f"the folder {path.parent} does not exist; make it first",
        errno.ENOTDIR: f"{path.parent} is not a folder",
        errno.EISDIR: "this is a folder; name a slab file in it, or a block device",
        errno.EACCES: "no permission to open it for reading and writing",
        errno.EPERM: "no permission to open it for reading and writing",
        errno.EROFS: "the filesystem is read-only",
        errno.ENXIO: "there is no device behind this file, or it is not a file or block device",
    }
    return OSError(number, texts.get(number, os.strerror(number)), str(path))


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(errno.EWOULDBLOCK, "already locked by another process or engine", str(path)) from error


def _claim_space(fd: int, path: Path, capacity_bytes: int) -> None:
    found = os.fstat(fd)
    if stat.S_ISBLK(found.st_mode):
        size_bytes = os.lseek(fd, 0, os.SEEK_END)
        if size_bytes < capacity_bytes:
            text = f"the device has {size_bytes} bytes, fewer than the capacity of {capacity_bytes}"
            raise OSError(errno.ENOSPC, text, str(path))
        return
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.ENODEV, "this is neither a regular file nor a block device", str(path))
    filesystem = os.fstatvfs(fd)
    free_bytes = filesystem.f_bavail * filesystem.f_frsize
    missing_bytes = capacity_bytes - found.st_blocks * 512
    full = f"no space for a slab of {capacity_bytes} bytes: {missing_bytes} more are needed, {free_bytes} are free"
    if missing_bytes > free_bytes:  # checked first: a fallocate that fails may have filled the disk before
        raise OSError(errno.ENOSPC, full, str(path))
    try:
        os.posix_fallocate(fd, 0, capacity_bytes)
    except OSError as error:
        if found.st_size < capacity_bytes:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, found.st_size)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, full, str(path)) from error
        if error.errno == errno.EFBIG:
            text = f"a file of {capacity_bytes} bytes is over the filesystem's or this process's limit (ulimit -f)"
            raise OSError(errno.EFBIG, text, str(path)) from error
        raise _explained(error, path) from error


def _filesystem_magic(fd: int) -> int:
    """`f_type` of statfs(2): the first word of the structure."""
    answer = (ctypes.c_long * 64)()
    if ctypes.CDLL(None, use_errno=True).fstatfs(fd, answer) != 0:
        return 0
    return int(answer[0])


def _piece_bytes(found: os.stat_result) -> int:
    if not stat.S_ISBLK(found.st_mode):
        return _FILE_PIECE_BYTES
    node = Path(f"/sys/dev/block/{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}")
    queue = node / "queue" if (node / "queue").is_dir() else node.resolve().parent / "queue"  # a partition's disk
    try:
        limit = int((queue / "max_sectors_kb").read_text()) << 10
    except (OSError, ValueError):
        limit = _PIECE_BYTES_MIN
    limit = min(max(limit, _PIECE_BYTES_MIN), _BLOCK_DEVICE_PIECE_BYTES)
    return 1 << (limit.bit_length() - 1)
