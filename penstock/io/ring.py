"""One io_uring: its shared rings, system calls and registration, independent of the meaning of entries."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from typing import Literal

from penstock.io import uring_abi as abi

_FLAG_SETS = (abi.SETUP_SUBMIT_ALL | abi.SETUP_COOP_TASKRUN, 0)  # newest first; older kernels refuse with EINVAL
_TRANSIENT = frozenset((errno.EINTR, errno.EAGAIN, errno.EBUSY, errno.ETIME))


class Ring:
    """Submission and completion rings of `entries` entries. Not thread-safe: one thread at a time.

    A caller packs an entry at `sqes[next_entry():]`, at most `space()` of them, then calls `submit` or `wait`. Entries
    are 64 bytes, or 128 for NVMe passthrough commands (whose completions are twice as large too). The submission side
    needs no memory barrier: without a kernel polling thread, the kernel reads the ring inside the system call of this
    same thread.
    """

    def __init__(self, entries: int, sqe_bytes: Literal[64, 128] = 64) -> None:
        """Raises OSError: ENOSYS or EPERM where io_uring is absent or forbidden, EOPNOTSUPP where it is too old."""
        self.sqe_bytes = sqe_bytes
        self._cqe = abi.CQE if sqe_bytes == 64 else abi.CQE32
        self._barrier = abi.barrier()
        self._params = abi.Params()
        self.fd = self._setup(entries, abi.SETUP_SQE128 | abi.SETUP_CQE32 if sqe_bytes == 128 else 0)
        try:
            self._map()
        except BaseException:
            os.close(self.fd)
            raise

    def _setup(self, entries: int, flags: int) -> int:
        for tried in _FLAG_SETS:
            self._params = abi.Params(flags=flags | tried)
            try:
                return abi.setup(entries, self._params)
            except OSError as error:
                if error.errno != errno.EINVAL or tried == _FLAG_SETS[-1]:
                    raise
        raise AssertionError("unreachable: the last set of flags returns or raises")

    def _map(self) -> None:
        params = self._params
        wanted = abi.FEAT_SINGLE_MMAP | abi.FEAT_NODROP | abi.FEAT_EXT_ARG
        if params.features & wanted != wanted:
            raise OSError(errno.EOPNOTSUPP, "this kernel's io_uring has no timed wait; Linux 5.11 or later is needed")
        sq, cq = params.sq_off, params.cq_off
        size = max(sq.array + 4 * params.sq_entries, cq.cqes + self._cqe.size * params.cq_entries)
        shared = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self._rings = mmap.mmap(self.fd, size, flags=shared, offset=abi.OFF_SQ_RING)
        self._sqe_map = mmap.mmap(self.fd, params.sq_entries * self.sqe_bytes, flags=shared, offset=abi.OFF_SQES)
        self.sqes = memoryview(self._sqe_map)
        self._cqes = memoryview(self._rings)[cq.cqes : cq.cqes + self._cqe.size * params.cq_entries]
        self._sq_head = ctypes.c_uint32.from_buffer(self._rings, sq.head)
        self._sq_tail = ctypes.c_uint32.from_buffer(self._rings, sq.tail)
        self._cq_head = ctypes.c_uint32.from_buffer(self._rings, cq.head)
        self._cq_tail = ctypes.c_uint32.from_buffer(self._rings, cq.tail)
        self.entries: int = params.sq_entries
        self._sq_mask: int = params.sq_entries - 1
        self._cq_mask: int = params.cq_entries - 1
        self._tail = self._sq_tail.value
        order = (ctypes.c_uint32 * params.sq_entries).from_buffer(self._rings, sq.array)
        order[:] = list(range(params.sq_entries))

    def space(self) -> int:
        """Entries that can be packed before the next `submit`."""
        return self.entries - self._queued()

    def _queued(self) -> int:
        return (self._tail - self._sq_head.value) & 0xFFFFFFFF

    def next_entry(self) -> int:
        """Byte offset in `sqes` of the next entry, which the caller fills now (all of its bytes)."""
        at = (self._tail & self._sq_mask) * self.sqe_bytes
        self._tail = (self._tail + 1) & 0xFFFFFFFF
        return at

    def submit(self) -> None:
        """Submit packed entries to the kernel without waiting. Entries that it does not accept now stay packed for the
        next call. Raises OSError except for a temporary shortage."""
        self._sq_tail.value = self._tail
        self._judge(abi.submit(self.fd, self._queued()))

    def wait(self, completions: int, timeout_s: float) -> None:
        """Submit packed entries, then wait until `completions` are ready, a signal arrives, or `timeout_s` has
        passed."""
        self._sq_tail.value = self._tail
        self._judge(abi.enter(self.fd, self._queued(), completions, timeout_s))

    @staticmethod
    def _judge(result: int) -> None:
        if result < 0 and -result not in _TRANSIENT:
            raise OSError(-result, f"io_uring_enter: {os.strerror(-result)}")

    def completions(self) -> list[tuple[int, int]]:
        """Take out the ready completions, as `(user_data, result)`; a negative result is an error number."""
        head, tail = self._cq_head.value, self._cq_tail.value
        if head == tail:
            return []
        self._barrier()
        first, end = head & self._cq_mask, (tail - 1 & self._cq_mask) + 1
        taken: list[tuple[int, int]] = []
        for entries in ((first, end),) if first < end else ((first, self._cq_mask + 1), (0, end)):
            taken += self._cqe.iter_unpack(self._cqes[entries[0] * self._cqe.size : entries[1] * self._cqe.size])
        self._barrier()
        self._cq_head.value = tail
        return taken

    def register_file(self, fd: int) -> None:
        """Make `fd` registered file 0. Raises OSError."""
        abi.register(self.fd, abi.REGISTER_FILES, (ctypes.c_int32 * 1)(fd), 1)

    def register_buffer_table(self, slots: int) -> None:
        """Create an empty table of registered buffers. Raises OSError (EINVAL before Linux 5.13)."""
        empty = (abi.Iovec * slots)()
        table = abi.RsrcRegister(nr=slots, data=ctypes.addressof(empty))
        abi.register(self.fd, abi.REGISTER_BUFFERS2, table, ctypes.sizeof(table))

    def register_buffer(self, slot: int, address: int, length: int) -> None:
        """Pin memory and put it into a slot of the table. Raises OSError (ENOMEM: over the memory lock limit)."""
        iovec = abi.Iovec(address, length)
        update = abi.RsrcUpdate2(offset=slot, data=ctypes.addressof(iovec), nr=1)
        abi.register(self.fd, abi.REGISTER_BUFFERS_UPDATE, update, ctypes.sizeof(update))

    def close(self) -> None:
        """Release the ring. Registered files and memory are released on return, those of operations in flight later."""
        for opcode in (abi.UNREGISTER_FILES, abi.UNREGISTER_BUFFERS):
            with contextlib.suppress(OSError):  # nothing was registered
                abi.register(self.fd, opcode, None, 0)
        self.sqes.release()
        self._cqes.release()
        del self._sq_head, self._sq_tail, self._cq_head, self._cq_tail
        for mapping in (self._rings, self._sqe_map):
            with contextlib.suppress(BufferError):
                mapping.close()
        os.close(self.fd)


def probe() -> str | None:
    """Why io_uring cannot be used here, or None when a test ring could be made."""
    try:
        Ring(4).close()
    except OSError as error:
        return explain(error)
    return None


def explain(error: OSError) -> str:
    """A readable reason why a ring could not be made, with advice."""
    if error.errno == errno.ENOSYS:
        return "this kernel has no io_uring, or a container's seccomp profile hides it"
    if error.errno == errno.EPERM:
        return (
            "io_uring is forbidden to this process: sysctl kernel.io_uring_disabled, or a container's seccomp profile "
            "(Docker's default one; run with --security-opt seccomp=... that allows io_uring_setup/enter/register)"
        )
    if error.errno == errno.ENOMEM:
        return "io_uring could not get its memory: raise the memory lock limit (ulimit -l) or free memory"
    return f"io_uring failed: {error.strerror or error}"
