"""An NVMe namespace by its generic device: opens, identifies, sizes and locks it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from penstock.core.layout import STAGING_ALIGNMENT_BYTES
from penstock.io import nvme_abi
from penstock.io.device import Device, in_use
from penstock.io.nvme_abi import NamespaceFormat

_PAGE_BYTES = 4096
_TRANSFER_BYTES_MAX = 4 << 20
_TRANSFER_BYTES_DEFAULT = 128 << 10
_SEGMENTS_DEFAULT = 32
_SYS = Path("/sys")
_DEV = Path("/dev")


@dataclass(slots=True)
class NvmeDevice(Device):
    """An open namespace. `fd` is its generic character device; `block_fd`, if there is a block device, is opened
    exclusively, so that it cannot be mounted or opened as a slab meanwhile."""

    nsid: int = 0
    block_bytes: int = 0
    block_fd: int | None = None

    def close(self) -> None:
        """Unlock the namespace and close both devices."""
        if self.block_fd is not None:
            fcntl.flock(self.block_fd, fcntl.LOCK_UN)
            os.close(self.block_fd)
            self.block_fd = None
        fcntl.flock(self.fd, fcntl.LOCK_UN)
        os.close(self.fd)


def open_namespace(path: Path, capacity_bytes: int | None) -> NvmeDevice:
    """Open the generic device `path` (/dev/ngXnY) for its first `capacity_bytes` bytes; None: all of it, in whole 4
    KiB.

    Raises ValueError for a bad capacity, OSError with the reason for everything else: not a generic NVMe device, no
    permission, mounted or in use, has partitions, a format that is not supported, smaller than the capacity.
    """
    if capacity_bytes is not None and (capacity_bytes < 1 or capacity_bytes % STAGING_ALIGNMENT_BYTES):
        raise ValueError(
            f"capacity_bytes is {capacity_bytes}; it must be a positive multiple of {STAGING_ALIGNMENT_BYTES}"
        )
    block_name = _block_name(path)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _explained(error, path) from error
    device = NvmeDevice(path, fd, 0, True, 0)
    try:
        _lock(fd, path)
        _hold_block_device(device, block_name)
        try:
            found = nvme_abi.identify(fd)
        except OSError as error:
            raise _explained(error, path) from error
        device.nsid, device.block_bytes = found.nsid, found.block_bytes
        _check_format(found, path, block_name)
        device.capacity_bytes = _capacity(found, path, capacity_bytes)
        device.piece_bytes = _piece_bytes(found, block_name)
        return device
    except BaseException:
        device.close()
        raise


def _block_name(path: Path) -> str:
    """The kernel's name of the block device beside the generic one: nvme0n1 for ng0n1."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise _explained(error, path) from error
    wanted = "the generic device of an NVMe namespace, such as /dev/ng0n1"
    if stat.S_ISBLK(found.st_mode):
        raise OSError(errno.ENODEV, f"this is a block device; the nvme engine takes {wanted}", str(path))
    if not stat.S_ISCHR(found.st_mode):
        raise OSError(errno.ENODEV, f"this is not a device; the nvme engine takes {wanted}", str(path))
    number = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
    name = (_SYS / "dev" / "char" / number).resolve().name
    if not re.fullmatch(r"ng\d+(c\d+)?n\d+", name):
        raise OSError(errno.ENODEV, f"this is not {wanted}", str(path))
    return f"nvme{name[2:]}"


def _explained(error: OSError, path: Path) -> OSError:
    number = error.errno or errno.EIO
    texts = {
        errno.ENOENT: "no such device",
        errno.ENXIO: "there is no device behind this file",
        errno.ENODEV: "there is no device behind this file",
        errno.EACCES: "no permission: NVMe passthrough needs root (CAP_SYS_ADMIN)",
        errno.EPERM: "no permission: NVMe passthrough needs root (CAP_SYS_ADMIN)",
    }
    return OSError(number, texts.get(number, error.strerror or os.strerror(number)), str(path))


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(errno.EWOULDBLOCK, "already locked by another process or engine", str(path)) from error


def _hold_block_device(device: NvmeDevice, block_name: str) -> None:
    path, sysfs, node = device.path, _SYS / "class" / "block" / block_name, _DEV / block_name
    partitions = sorted(entry.name for entry in sysfs.glob(f"{block_name}p*"))
    if partitions:
        text = f"its block device has partitions ({', '.join(partitions)}); name an unused namespace, or erase this one"
        raise OSError(errno.EBUSY, text, str(path))
    holders = sorted(os.listdir(sysfs / "holders")) if (sysfs / "holders").is_dir() else []
    if holders:
        raise OSError(errno.EBUSY, f"its block device is in use by {', '.join(holders)}", str(path))
    try:
        block_fd = os.open(node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except FileNotFoundError:
        device.notes.append(f"{node} is not visible here: other processes can still use it as a block device")
        return
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise in_use(node, f"its block device {node} is in use, for example mounted", path) from error
        text = f"its block device {node} cannot be locked: {error.strerror}"
        if error.errno == errno.EACCES:
            text = f"no permission to lock its block device {node}"
        raise OSError(error.errno or errno.EIO, text, str(path)) from error
    device.block_fd = block_fd
    _lock(block_fd, node)


def _check_format(found: NamespaceFormat, path: Path, block_name: str) -> None:
    text = None
    if found.metadata_bytes:
        text = f"it is formatted with {found.metadata_bytes} bytes of metadata per block; choose a format without"
    elif _sysfs_text(block_name, "zoned", "none") != "none":
        text = "it is a zoned namespace, which cannot be written in any order"
    elif found.block_bytes > STAGING_ALIGNMENT_BYTES:
        text = f"its blocks have {found.block_bytes} bytes; at most {STAGING_ALIGNMENT_BYTES} are supported"
    if text:
        raise OSError(errno.EOPNOTSUPP, text, str(path))
    if found.write_protected:
        raise OSError(errno.EROFS, "the namespace is write-protected", str(path))


def _capacity(found: NamespaceFormat, path: Path, capacity_bytes: int | None) -> int:
    size_bytes = found.blocks * found.block_bytes
    whole_bytes = size_bytes // STAGING_ALIGNMENT_BYTES * STAGING_ALIGNMENT_BYTES
    if capacity_bytes is None and whole_bytes:
        return whole_bytes
    if capacity_bytes is None or size_bytes < capacity_bytes:
        wanted = STAGING_ALIGNMENT_BYTES if capacity_bytes is None else capacity_bytes
        text = f"the namespace has {size_bytes} bytes, fewer than the capacity of {wanted}"
        raise OSError(errno.ENOSPC, text, str(path))
    return capacity_bytes


def _piece_bytes(found: NamespaceFormat, block_name: str) -> int:
    """The largest power of two in bytes that one command may move, by the limits of the controller and of the
    kernel."""
    kernel_bytes = int(_sysfs_text(block_name, "max_hw_sectors_kb", str(_TRANSFER_BYTES_DEFAULT >> 10))) << 10
    segments = int(_sysfs_text(block_name, "max_segments", str(_SEGMENTS_DEFAULT)))
    limit = max(min(found.transfer_bytes_max, kernel_bytes, segments * _PAGE_BYTES, _TRANSFER_BYTES_MAX), _PAGE_BYTES)
    return 1 << (limit.bit_length() - 1)


def _sysfs_text(block_name: str, name: str, default: str) -> str:
    with contextlib.suppress(OSError):
        return (_SYS / "class" / "block" / block_name / "queue" / name).read_text().strip()
    return default
