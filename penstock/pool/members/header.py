"""The first page of a slab: a magic number, its format, and the id that pairs it with its table."""

from __future__ import annotations

import errno
import struct
import time
from pathlib import Path
from typing import Literal

from penstock.core.layout import STAGING_ALIGNMENT_BYTES
from penstock.io.api import BlockEngine, IoOp
from penstock.io.memory import aligned_buffer
from penstock.private_file import open_stored

HEADER_BYTES = STAGING_ALIGNMENT_BYTES
HEADER_FORMAT = 1
NEW_BYTES = 1 << 20  # must be zeros in a new slab: other formats have their superblock behind the first page
TRANSFER_TIMEOUT_S = 10.0
_PIECE_BYTES = 64 << 10
_MAGIC = b"PENSTOCK SLAB\n\0\0"
_HEADER = struct.Struct("<16sI16s")


class SlabRefused(OSError):
    """The slab or its table must not be used or changed by this version."""


def pack_header(identity: bytes) -> bytes:
    """The whole first page."""
    return _HEADER.pack(_MAGIC, HEADER_FORMAT, identity).ljust(HEADER_BYTES, b"\0")


def parse_header(raw: bytes, where: str) -> bytes | None:
    """The id in a first page; None for a page of zeros (no slab yet). Raises SlabRefused for other content or
    format."""
    if not any(raw):
        return None
    if len(raw) < _HEADER.size or not raw.startswith(_MAGIC):
        raise SlabRefused(f"{where} holds something that is not a Penstock slab; name another one, or erase this one")
    _, version, identity = _HEADER.unpack_from(raw)
    if version != HEADER_FORMAT:
        raise SlabRefused(
            f"{where} is a slab of format {version}, this version reads format {HEADER_FORMAT}; "
            f"delete it and its table to start empty"
        )
    return bytes(identity)


def refuse_foreign_file(path: Path) -> None:
    """Raise SlabRefused where a file holds something else. To be called before an engine allocates the file's space."""
    if path.is_file():
        with open_stored(path) as slab:
            parse_header(slab.read(HEADER_BYTES), str(path))


def read_page(engine: BlockEngine, where: str) -> bytes:
    """The first page, through the engine. Raises OSError."""
    page = aligned_buffer(HEADER_BYTES)
    transfer(engine, "read", 0, page, where)
    return bytes(page)


def write_header(engine: BlockEngine, identity: bytes, where: str) -> None:
    """Write the header of a slab, durably. Raises OSError."""
    page = aligned_buffer(HEADER_BYTES)
    page[:] = pack_header(identity)
    transfer(engine, "write", 0, page, where)
    engine.sync()


def refuse_foreign_content(engine: BlockEngine, where: str) -> None:
    """Raise SlabRefused unless the first NEW_BYTES are zeros, or OSError. A first page of zeros is not enough: the
    superblocks of btrfs, ZFS, bcache and md lie behind it."""
    piece = aligned_buffer(_PIECE_BYTES)
    for at in range(0, min(NEW_BYTES, engine.capacity_bytes), _PIECE_BYTES):
        part = piece[: min(_PIECE_BYTES, engine.capacity_bytes - at)]
        transfer(engine, "read", at, part, where)
        if any(part):
            raise SlabRefused(
                f"{where} has no header of a slab, and other content in its first {NEW_BYTES >> 20} MiB; nothing is "
                "changed. Allowed: a file that is not there yet, or a device whose beginning was overwritten with zeros"
            )


def transfer(
    engine: BlockEngine,
    kind: Literal["read", "write"],
    offset: int,
    buffer: memoryview,
    where: str,
    timeout_s: float = TRANSFER_TIMEOUT_S,
) -> None:
    """Do one operation on an engine that is not used elsewhere meanwhile. Raises OSError."""
    engine.submit([IoOp(kind, offset, buffer, None)])
    deadline_s = time.monotonic() + timeout_s
    while (remaining_s := deadline_s - time.monotonic()) > 0:
        for completion in engine.poll(min(remaining_s, 1.0)):
            if completion.error is not None:
                raise completion.error
            return
    raise TimeoutError(errno.ETIMEDOUT, f"the device did not answer a {kind} within {timeout_s:.0f} s", where)
