"""Child process for tests: `restricted.py no-uring ERRNO | memlock KIB -- CODE` runs CODE under that restriction."""

from __future__ import annotations

import ctypes
import resource
import struct
import sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
SYS_IO_URING_SETUP = 425


def refuse_io_uring(number: int) -> None:
    """Install a seccomp filter as containers do: io_uring_setup fails with `number`."""
    program = b"".join(
        struct.pack("<HBBI", *line)
        for line in (
            (0x20, 0, 0, 0),  # load the system call's number
            (0x15, 0, 1, SYS_IO_URING_SETUP),
            (0x06, 0, 0, 0x00050000 | number),  # fail with this error
            (0x06, 0, 0, 0x7FFF0000),  # allow
        )
    )
    memory = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", 4, ctypes.addressof(memory)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0) == 0, ctypes.get_errno()


def limit_memlock(kib: int) -> None:
    """Lower the memory lock limit, and give up root's privileges, which it does not bind."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (kib << 10, kib << 10))
    header = ctypes.create_string_buffer(struct.pack("<Ii", 0x20080522, 0))
    nothing = ctypes.create_string_buffer(24)
    assert ctypes.CDLL(None, use_errno=True).capset(header, nothing) == 0


if __name__ == "__main__":
    import penstock.io

    restriction, value, _, code = sys.argv[1:]
    {"no-uring": refuse_io_uring, "memlock": limit_memlock}[restriction](int(value))
    exec(code, {"penstock": penstock})
