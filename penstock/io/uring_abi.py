"""The Linux io_uring ABI for Python: system calls, constants, and the layout of its structures.

Source: `include/uapi/linux/io_uring.h`. The system call numbers are the same on every architecture.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

SYS_IO_URING_SETUP = 425
SYS_IO_URING_ENTER = 426
SYS_IO_URING_REGISTER = 427
_SYS_MEMBARRIER = {"aarch64": 283, "riscv64": 283}

SETUP_SUBMIT_ALL = 1 << 7  # Linux 5.18
SETUP_COOP_TASKRUN = 1 << 8  # Linux 5.19: no interrupt of the submitting thread at each completion
SETUP_SQE128 = 1 << 10  # Linux 5.19
SETUP_CQE32 = 1 << 11  # Linux 5.19

FEAT_SINGLE_MMAP = 1 << 0
FEAT_NODROP = 1 << 1
FEAT_EXT_ARG = 1 << 8  # Linux 5.11: a timeout on enter

ENTER_GETEVENTS = 1 << 0
ENTER_EXT_ARG = 1 << 3

OFF_SQ_RING = 0
OFF_SQES = 0x10000000

OP_NOP = 0
OP_READ_FIXED = 4
OP_WRITE_FIXED = 5
OP_TIMEOUT = 11
OP_READ = 22
OP_WRITE = 23
OP_URING_CMD = 46  # Linux 5.19

SQE_FIXED_FILE = 1 << 0
SQE_LINK = 1 << 2  # the next entry starts when this one has succeeded
URING_CMD_FIXED = 1 << 0  # Linux 6.1: the command's memory is a registered buffer

UNREGISTER_BUFFERS = 1
REGISTER_FILES = 2
UNREGISTER_FILES = 3
REGISTER_BUFFERS2 = 15  # Linux 5.13
REGISTER_BUFFERS_UPDATE = 16

# struct io_uring_sqe of a read or write: opcode, flags, ioprio, fd, offset, address, length, rw_flags, user_data,
# buf_index, personality, splice_fd_in, addr3, pad
SQE_RW = struct.Struct("<BBHiQQIIQHHiQQ")
# struct io_uring_cqe: user_data, res; its flags are not used
CQE = struct.Struct("<Qi4x")
CQE32 = struct.Struct("<Qi20x")  # of a ring with SETUP_CQE32


class SqOffsets(ctypes.Structure):
    """`struct io_sqring_offsets`."""

    _fields_ = [
        (name, ctypes.c_uint32)
        for name in ("head", "tail", "ring_mask", "ring_entries", "flags", "dropped", "array", "resv1")
    ] + [("user_addr", ctypes.c_uint64)]  # fmt: skip


class CqOffsets(ctypes.Structure):
    """`struct io_cqring_offsets`."""

    _fields_ = [
        (name, ctypes.c_uint32)
        for name in ("head", "tail", "ring_mask", "ring_entries", "overflow", "cqes", "flags", "resv1")
    ] + [("user_addr", ctypes.c_uint64)]  # fmt: skip


class Params(ctypes.Structure):
    """`struct io_uring_params`."""

    _fields_ = [
        ("sq_entries", ctypes.c_uint32),
        ("cq_entries", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("sq_thread_cpu", ctypes.c_uint32),
        ("sq_thread_idle", ctypes.c_uint32),
        ("features", ctypes.c_uint32),
        ("wq_fd", ctypes.c_uint32),
        ("resv", ctypes.c_uint32 * 3),
        ("sq_off", SqOffsets),
        ("cq_off", CqOffsets),
    ]


class Timespec(ctypes.Structure):
    """`struct __kernel_timespec`."""

    _fields_ = [("tv_sec", ctypes.c_int64), ("tv_nsec", ctypes.c_int64)]


class GeteventsArg(ctypes.Structure):
    """`struct io_uring_getevents_arg`."""

    _fields_ = [
        ("sigmask", ctypes.c_uint64),
        ("sigmask_sz", ctypes.c_uint32),
        ("min_wait_usec", ctypes.c_uint32),
        ("ts", ctypes.c_uint64),
    ]


class Iovec(ctypes.Structure):
    """`struct iovec`."""

    _fields_ = [("base", ctypes.c_uint64), ("length", ctypes.c_uint64)]


class RsrcRegister(ctypes.Structure):
    """`struct io_uring_rsrc_register`."""

    _fields_ = [
        ("nr", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("resv2", ctypes.c_uint64),
        ("data", ctypes.c_uint64),
        ("tags", ctypes.c_uint64),
    ]


class RsrcUpdate2(ctypes.Structure):
    """`struct io_uring_rsrc_update2`."""

    _fields_ = [
        ("offset", ctypes.c_uint32),
        ("resv", ctypes.c_uint32),
        ("data", ctypes.c_uint64),
        ("tags", ctypes.c_uint64),
        ("nr", ctypes.c_uint32),
        ("resv2", ctypes.c_uint32),
    ]


# One handle releases the interpreter lock during the call, for waits. The other does not, for calls that only submit:
# to get the lock back from a thread that computes may take a switch interval (5 ms).
_syscall_wait = ctypes.CDLL(None, use_errno=True).syscall
_syscall_quick = ctypes.PyDLL(None, use_errno=True).syscall
for _call in (_syscall_wait, _syscall_quick):
    _call.restype = ctypes.c_long


def _failed(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


def setup(entries: int, params: Params) -> int:
    """io_uring_setup; returns the ring's file descriptor. Raises OSError."""
    fd: int = _syscall_wait(ctypes.c_long(SYS_IO_URING_SETUP), ctypes.c_uint(entries), ctypes.byref(params))
    if fd < 0:
        raise _failed("io_uring_setup")
    return fd


def submit(fd: int, to_submit: int) -> int:
    """io_uring_enter that submits entries and reaps ready completions without waiting; holds the interpreter lock.
    Returns the number of entries consumed, or minus the error number."""
    done: int = _syscall_quick(
        ctypes.c_long(SYS_IO_URING_ENTER),
        ctypes.c_int(fd),
        ctypes.c_uint(to_submit),
        ctypes.c_uint(0),
        ctypes.c_uint(ENTER_GETEVENTS),
        ctypes.c_void_p(None),
        ctypes.c_size_t(0),
    )
    return done if done >= 0 else -ctypes.get_errno()


def enter(fd: int, to_submit: int, wait_for: int, timeout_s: float) -> int:
    """io_uring_enter that waits for `wait_for` completions, at most `timeout_s`; other threads run meanwhile.
    Returns the number of entries consumed, or minus the error number (ETIME when time ran out)."""
    timeout_ns = max(0, int(timeout_s * 1e9))
    timespec = Timespec(*divmod(timeout_ns, 1_000_000_000))
    argument = GeteventsArg(ts=ctypes.addressof(timespec))
    done: int = _syscall_wait(
        ctypes.c_long(SYS_IO_URING_ENTER),
        ctypes.c_int(fd),
        ctypes.c_uint(to_submit),
        ctypes.c_uint(wait_for),
        ctypes.c_uint(ENTER_GETEVENTS | ENTER_EXT_ARG),
        ctypes.byref(argument),
        ctypes.c_size_t(ctypes.sizeof(argument)),
    )
    return done if done >= 0 else -ctypes.get_errno()


def register(
    fd: int, opcode: int, argument: ctypes.Structure | ctypes.Array[ctypes.c_int32] | None, count: int
) -> None:
    """io_uring_register. Raises OSError."""
    done: int = _syscall_wait(
        ctypes.c_long(SYS_IO_URING_REGISTER),
        ctypes.c_int(fd),
        ctypes.c_uint(opcode),
        ctypes.c_void_p(None) if argument is None else ctypes.byref(argument),
        ctypes.c_uint(count),
    )
    if done < 0:
        raise _failed("io_uring_register")


class _Barrier:
    """Orders memory accesses around ring indices.

    x86-64 keeps loads in order with loads and stores with stores, so plain accesses are enough there. Elsewhere
    membarrier(2) is a full barrier for the calling thread.
    """

    _REGISTER_PRIVATE_EXPEDITED = 1 << 4
    _PRIVATE_EXPEDITED = 1 << 3

    def __init__(self, machine: str) -> None:
        self.needed = machine not in ("x86_64", "AMD64")
        self._number = _SYS_MEMBARRIER.get(machine)
        if self.needed and (self._number is None or self._call(self._REGISTER_PRIVATE_EXPEDITED) < 0):
            raise OSError(errno.ENOSYS, f"io_uring on {machine} needs membarrier(2), which this kernel refuses")

    def _call(self, command: int) -> int:
        result: int = _syscall_quick(
            ctypes.c_long(self._number or 0), ctypes.c_int(command), ctypes.c_uint(0), ctypes.c_int(0)
        )
        return result

    def __call__(self) -> None:
        if self.needed:
            self._call(self._PRIVATE_EXPEDITED)


def barrier() -> _Barrier:
    """The barrier of this machine. Raises OSError where there is none."""
    return _Barrier(platform.machine())
