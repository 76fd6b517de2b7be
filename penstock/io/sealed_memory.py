"""Memory that processes share: files without a name whose size cannot change, so that no reader can fault.

Verification: tests/io/test_sealed_memory.py. Fault: a peer that shortened its file killed every process
that read it (SIGBUS).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create_sealed(name: str, size_bytes: int) -> int:
    """Make memory of a fixed size; returns its descriptor. `name` is shown in /proc. Raises OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_sealed(fd: int, size_bytes: int) -> None:
    """Raise OSError unless a peer's descriptor is memory of this user, with this size fixed. To be called before it is
    mapped."""
    found = os.fstat(fd)
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS) if stat.S_ISREG(found.st_mode) else 0
    except OSError:  # not a memory file
        seals = 0
    if seals & _SEALS != _SEALS:
        raise OSError(errno.EPERM, "it is not memory whose size is sealed: its owner could make a reader fault")
    if found.st_uid != os.geteuid():
        raise OSError(errno.EPERM, f"it is memory of user {found.st_uid}, not of {os.geteuid()}")
    if found.st_size != size_bytes:
        raise OSError(errno.EINVAL, f"it has {found.st_size} bytes, not {size_bytes}")
