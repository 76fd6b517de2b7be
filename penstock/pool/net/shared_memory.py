"""One-sided reads between processes of one host: memory files without a name, opened through the owner's process.

A killed process leaves nothing behind: the kernel frees the memory with its last mapping. Only sealed files are mapped,
as their owner cannot shorten them (an access beyond the end would kill the reader).
"""

from __future__ import annotations

import mmap
import os
import secrets
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from penstock.framing import NO_MESSAGE, said
from penstock.io.memory import address_of
from penstock.io.sealed_memory import check_sealed, create_sealed
from penstock.pool.api import PoolError
from penstock.pool.net.one_sided import RelayTransport, RemoteMemory
from penstock.pool.net.wire import ADDRESS_BYTES_MAX, Label

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class MemoryFile(msgspec.Struct, array_like=True):
    """Where the file is, and its identity: the kernel's boot id, the process namespace, a random name."""

    boot_id: Label
    processes: Label
    pid: Annotated[int, Meta(ge=1, le=1 << 31)]
    fd: Annotated[int, Meta(ge=0, le=1 << 31)]
    name: Label
    size_bytes: Annotated[int, Meta(ge=1, le=ADDRESS_BYTES_MAX)]


_descriptions = msgspec.msgpack.Decoder(MemoryFile)


def _this_host() -> tuple[str, str]:
    return _BOOT_ID.read_text().strip(), os.readlink("/proc/self/ns/pid")


class SharedMemoryMover:
    """Contract: `one_sided.Mover`."""

    kind: RelayTransport = "shared-memory"

    def __init__(self) -> None:
        self._files: dict[int, tuple[int, str, int]] = {}  # address -> fd, name, size

    def allocate(self, size_bytes: int) -> memoryview:
        """A sealed memory file of `size_bytes`, mapped."""
        name = f"penstock-{secrets.token_hex(8)}"
        fd = create_sealed(name, size_bytes)
        memory = memoryview(mmap.mmap(fd, size_bytes))
        self._files[address_of(memory)] = (fd, name, size_bytes)
        return memory

    def export(self, memory: memoryview) -> bytes:
        """Host, process and file of memory of `allocate`, as bytes for `attach`."""
        fd, name, size_bytes = self._files[address_of(memory)]
        return msgspec.msgpack.encode(MemoryFile(*_this_host(), os.getpid(), fd, name, size_bytes))

    def attach(self, description: bytes) -> RemoteMemory:
        """Map memory that a process of this host exported. Raises PoolError("network") when the memory is on another
        host, or was freed."""
        try:
            there = _descriptions.decode(description)
            if (there.boot_id, there.processes) != _this_host():
                raise PoolError("network", "the memory is on another host: shared memory needs the same one")
            path = f"/proc/{there.pid}/fd/{there.fd}"
            if os.readlink(path).split(" ")[0] != f"/memfd:{there.name}":
                raise PoolError("network", f"process {there.pid} does not have that memory any more")
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                check_sealed(fd, there.size_bytes)
                mapped = mmap.mmap(fd, there.size_bytes, prot=mmap.PROT_READ)
            finally:
                os.close(fd)
        except (OSError, *NO_MESSAGE) as error:
            raise PoolError("network", f"shared memory cannot be attached: {said(error)}") from None
        return _Mapped(mapped)

    def close(self) -> None:
        """Close the files; the memory is freed with its last view."""
        files, self._files = self._files, {}
        for fd, _, _ in files.values():
            os.close(fd)


class _Mapped:
    """A peer's memory, mapped read-only."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._bytes = np.frombuffer(mapped, np.uint8)

    def read(self, offset: int, into: memoryview, timeout_s: float) -> None:
        size = len(into)
        if not 0 <= offset <= len(self._bytes) - size:
            raise PoolError("layout", f"{size} bytes at {offset}; the peer's memory has {len(self._bytes)}")
        np.copyto(np.frombuffer(into, np.uint8), self._bytes[offset : offset + size])  # without the GIL

    def close(self) -> None:
        """Drop the mapping; the memory is unmapped with its last view."""
        self._bytes = np.empty(0, np.uint8)
