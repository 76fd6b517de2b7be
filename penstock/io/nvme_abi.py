"""The Linux NVMe passthrough ABI for Python: commands, the Identify data, and texts of status codes.

Sources: `include/uapi/linux/nvme_ioctl.h`; NVM Express Base Specification 2.0 (Identify, figures of status codes).
"""

from __future__ import annotations

import ctypes
import fcntl
import struct
from dataclasses import dataclass

IOCTL_ID = 0x4E40
IOCTL_ADMIN_CMD = 0xC0484E41
IOCTL_IO_CMD = 0xC0484E43
URING_CMD_IO = 0xC0484E80

OPCODE_FLUSH = 0x00
OPCODE_WRITE = 0x01
OPCODE_READ = 0x02
_ADMIN_IDENTIFY = 0x06
_IDENTIFY_NAMESPACE, _IDENTIFY_CONTROLLER = 0, 1
_IDENTIFY_BYTES = 4096

# struct io_uring_sqe of a command: opcode, flags, ioprio, fd, cmd_op, pad, addr, len, uring_cmd_flags, user_data,
# buf_index, personality, file_index; then struct nvme_uring_cmd: opcode, flags, reserved, nsid, cdw2, cdw3, metadata,
# addr, metadata_len, data_len, cdw10 to cdw15, timeout_ms, reserved; and 8 unused bytes.
SQE_NVME = struct.Struct("<BBHiIIQIIQHHi BBHIIIQQIIIIIIIIII 8x")
assert SQE_NVME.size == 128


class PassthroughCommand(ctypes.Structure):
    """struct nvme_passthru_cmd"""

    _fields_ = [
        ("opcode", ctypes.c_uint8),
        ("flags", ctypes.c_uint8),
        ("rsvd1", ctypes.c_uint16),
        ("nsid", ctypes.c_uint32),
        ("cdw2", ctypes.c_uint32),
        ("cdw3", ctypes.c_uint32),
        ("metadata", ctypes.c_uint64),
        ("addr", ctypes.c_uint64),
        ("metadata_len", ctypes.c_uint32),
        ("data_len", ctypes.c_uint32),
        ("cdw10", ctypes.c_uint32),
        ("cdw11", ctypes.c_uint32),
        ("cdw12", ctypes.c_uint32),
        ("cdw13", ctypes.c_uint32),
        ("cdw14", ctypes.c_uint32),
        ("cdw15", ctypes.c_uint32),
        ("timeout_ms", ctypes.c_uint32),
        ("result", ctypes.c_uint32),
    ]


@dataclass(frozen=True, slots=True)
class NamespaceFormat:
    """The Identify data of a namespace. `transfer_bytes_max` is the controller's limit for one command (MDTS)."""

    nsid: int
    blocks: int
    block_bytes: int
    metadata_bytes: int
    write_protected: bool
    transfer_bytes_max: int


def identify(fd: int) -> NamespaceFormat:
    """Identify the namespace of the generic device `fd`. Raises OSError."""
    nsid = fcntl.ioctl(fd, IOCTL_ID)
    namespace = _identify(fd, _IDENTIFY_NAMESPACE, nsid)
    controller = _identify(fd, _IDENTIFY_CONTROLLER, 0)
    blocks = int.from_bytes(namespace[0:8], "little")
    formats, in_use = namespace[25] + 1, namespace[26]
    index = in_use & 0xF | ((in_use >> 1) & 0x30 if formats > 16 else 0)
    metadata_bytes, block_shift = struct.unpack_from("<HB", namespace, 128 + 4 * index)
    mdts = controller[77]  # power of two of the minimum page size, which is 4 KiB on Linux
    return NamespaceFormat(
        nsid, blocks, 1 << block_shift, metadata_bytes, bool(namespace[99] & 1), 4096 << mdts if mdts else 1 << 30
    )


def _identify(fd: int, what: int, nsid: int) -> bytes:
    answer = ctypes.create_string_buffer(_IDENTIFY_BYTES)
    command(
        fd,
        IOCTL_ADMIN_CMD,
        PassthroughCommand(
            opcode=_ADMIN_IDENTIFY, nsid=nsid, addr=ctypes.addressof(answer), data_len=_IDENTIFY_BYTES, cdw10=what
        ),
    )
    return answer.raw


def command(fd: int, ioctl: int, wanted: PassthroughCommand) -> None:
    """Execute one command and wait for it; other threads run meanwhile. Raises OSError, also for an NVMe status."""
    status = fcntl.ioctl(fd, ioctl, wanted)
    if status:
        raise OSError(5, status_text(status))


def status_text(status: int) -> str:
    """An NVMe status (type and code in its low 11 bits, as the kernel returns it) as text."""
    code = status & 0x7FF
    words = _STATUS.get(code) or _STATUS_TYPES.get(code >> 8, "vendor-specific or unknown")
    return f"{words} (NVMe status {code:#05x})"


_STATUS_TYPES = {0: "generic error", 1: "command-specific error", 2: "media error", 3: "path error"}
_STATUS = {
    0x001: "invalid command opcode",
    0x002: "invalid field in the command",
    0x004: "data transfer error",
    0x005: "aborted by a loss of power",
    0x006: "internal device error",
    0x007: "aborted on request",
    0x008: "aborted because its queue was deleted",
    0x00B: "invalid namespace or format",
    0x013: "invalid buffer pointer",
    0x020: "the namespace is write-protected",
    0x021: "interrupted, may be tried again",
    0x022: "transient transport error",
    0x080: "address beyond the end of the namespace (was it shrunk?)",
    0x081: "namespace capacity exceeded",
    0x082: "the namespace is not ready",
    0x083: "conflict with a reservation",
    0x084: "the namespace is being formatted",
    0x182: "write to a read-only range",
    0x280: "write fault",
    0x281: "unrecovered read error",
    0x282: "end-to-end guard check failed",
    0x283: "end-to-end application tag check failed",
    0x284: "end-to-end reference tag check failed",
    0x286: "access denied",
    0x287: "read of a deallocated or unwritten block",
    0x302: "the path to the namespace is inaccessible",
    0x303: "the path to the namespace is changing",
    0x370: "the host lost the path to the device",
    0x371: "aborted by the host",
}
