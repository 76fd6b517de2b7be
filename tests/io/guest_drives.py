"""The emulated NVMe drives of the guest: made outside, found by their serial inside."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import time
from pathlib import Path

from tests.io.qemu_guest import Drive

BLKZEROOUT = 0x127F
FIND_TIMEOUT_S = 20.0
FAULTY_OFFSET = 1 << 20  # reads of this sector fail
ODD_BYTES = (1 << 20) + 512
EXTRA_ARGUMENTS = ("-object", "throttle-group,id=slowly,x-bps-total=2097152")
_SLOW = (
    "driver=throttle,throttle-group=slowly,file.driver=raw,file.file.driver=file,file.file.filename={image},"
    "cache.no-flush=on"
)
_READ_ONLY = "driver=raw,read-only=on,file.driver=file,file.filename={image}"
_FAULTY = (
    "driver=raw,file.driver=blkdebug,file.image.driver=file,file.image.filename={image},"
    f"file.inject-error.0.event=read_aio,file.inject-error.0.sector={FAULTY_OFFSET // 512},"
    "file.inject-error.0.errno=5"
)


def make_drives(folder: Path) -> list[Drive]:
    """Images in `folder`, sparse, and the drives on them."""

    def image(name: str, size_bytes: int) -> Path:
        path = folder / name
        path.write_bytes(b"")
        os.truncate(path, size_bytes)
        return path

    blocks_4k = "logical_block_size=4096,physical_block_size=4096"
    drives = [
        Drive("lba512", image("lba512", 96 << 20)),
        Drive("lba4096", image("lba4096", 96 << 20), blocks_4k, "mdts=5"),
        Drive("odd", image("odd", ODD_BYTES)),
        Drive("metadata", image("metadata", 16 << 20), "ms=8"),
        Drive("zoned", image("zoned", 16 << 20), "zoned=on,zoned.zone_size=1M"),
        Drive("slow", image("slow", 16 << 20), backing=_SLOW),
        Drive("readonly", image("readonly", 16 << 20), backing=_READ_ONLY),
        Drive("faulty", image("faulty", 16 << 20), backing=_FAULTY),
        Drive("removed", image("removed", 16 << 20)),
    ]
    if shutil.which("mkfs.ext4"):
        drives.append(Drive("mounted", image("mounted", 16 << 20)))
        subprocess.run(["mkfs.ext4", "-q", folder / "mounted"], check=True)
    return drives


def controller(serial: str) -> Path:
    """Inside the guest: the controller's folder in sysfs. Waits, because the kernel finds drives after it started."""
    deadline_s = time.monotonic() + FIND_TIMEOUT_S
    while True:
        for found in Path("/sys/class/nvme").glob("nvme*"):
            if (found / "serial").read_text().strip() == serial:
                return found
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"no drive {serial}")
        time.sleep(0.02)


def generic_device(serial: str) -> Path:
    """Inside the guest: /dev/ngXn1 of a drive."""
    path = Path("/dev") / f"ng{controller(serial).name.removeprefix('nvme')}n1"
    deadline_s = time.monotonic() + FIND_TIMEOUT_S
    while not path.exists():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{path} did not appear")
        time.sleep(0.02)
    return path


def block_device(serial: str) -> Path:
    """Inside the guest: /dev/nvmeXn1 of a drive."""
    return generic_device(serial).with_name(f"nvme{generic_device(serial).name.removeprefix('ng')}")


def blank_namespace(serial: str, size_bytes: int) -> Path:
    """Inside the guest: a drive whose first `size_bytes` bytes are zero."""
    fd = os.open(block_device(serial), os.O_RDWR)
    try:
        fcntl.ioctl(fd, BLKZEROOUT, struct.pack("<QQ", 0, size_bytes))
    finally:
        os.close(fd)
    return generic_device(serial)
