"""Memory that processes share: files without a name whose size nobody can change, so that no peer's touch of it faults.

Verification: tests/io/test_sealed_memory.py. The fault behind it: a peer that made its file shorter ended every process
that read it (SIGBUS).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create_sealed(name: str, size_bytes: int) -> int:
    """The descriptor of new memory, of this size for ever. `name` is what /proc shows. Raises OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_sealed(fd: int, size_bytes: int) -> None:
    """Raises OSError unless the descriptor, which a peer gave, is memory of this user and of this size for ever. To be
    asked before it is mapped."""
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
