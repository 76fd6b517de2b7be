"""Block engines of `benchmarks pool` besides slabs: host memory, and one file per chunk through the kernel."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from penstock.io.api import IoCompletion, IoOp
from penstock.io.memory import aligned_buffer, checked_addresses

ALIGNMENT_BYTES = 4096


class OneAtATime(ABC):
    """Contract: `penstock.io.api.BlockEngine`. `poll` executes operations, one after the other."""

    name = "one-at-a-time"
    alignment_bytes = ALIGNMENT_BYTES

    def __init__(self, capacity_bytes: int, depth: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.depth = depth
        self.notes: list[str] = []
        self._waiting: deque[IoOp] = deque()
        self._ended: list[IoCompletion] = []

    @abstractmethod
    def _move(self, op: IoOp) -> None:
        """Move all bytes of `op`. Raises OSError."""

    def register(self, buffer: memoryview) -> None:  # noqa: B027
        """Does nothing: there is nothing to pin."""

    def submit(self, ops: Sequence[IoOp]) -> None:
        """Queue operations; `poll` executes them."""
        checked_addresses(ops, self.in_flight(), self.depth, self.capacity_bytes, ALIGNMENT_BYTES)
        self._waiting.extend(ops)

    def poll(self, timeout_s: float) -> list[IoCompletion]:
        """Execute one waiting operation; returns the ended ones. Does not wait."""
        if self._waiting:
            self._step()
        done, self._ended = self._ended, []
        return done

    def _step(self) -> None:
        op = self._waiting.popleft()
        error: OSError | None = None
        try:
            self._move(op)
        except OSError as problem:
            error = problem
        self._ended.append(IoCompletion(op.tag, error))

    def in_flight(self) -> int:
        """Operations that were submitted and that `poll` has not returned."""
        return len(self._waiting) + len(self._ended)

    def wake(self) -> None:  # noqa: B027
        """Does nothing: `poll` never waits."""

    def sync(self) -> None:  # noqa: B027
        """Does nothing: no data outlives the benchmark."""

    def close(self, timeout_s: float) -> None:
        """Execute all waiting operations."""
        while self._waiting:
            self._step()


class MemoryEngine(OneAtATime):
    """A memory module: copies between its own memory and the buffers."""

    name = "memory-copy"

    def __init__(self, capacity_bytes: int, depth: int) -> None:
        super().__init__(capacity_bytes, depth)
        self._memory = np.frombuffer(aligned_buffer(capacity_bytes), np.uint8)

    def _move(self, op: IoOp) -> None:
        mine = self._memory[op.offset : op.offset + op.buffer.nbytes]
        other = np.frombuffer(op.buffer, np.uint8)
        np.copyto(other, mine) if op.kind == "read" else np.copyto(mine, other)


class FilePerChunkEngine(OneAtATime):
    """Like most caches: each chunk is a file, read and written through the page cache.

    A chunk is what one write put at an offset; it is read whole.
    """

    name = "file-per-chunk"

    def __init__(self, folder: Path, capacity_bytes: int, depth: int) -> None:
        super().__init__(capacity_bytes, depth)
        self._folder = folder

    def _path(self, offset: int) -> Path:
        return self._folder / f"chunk-{offset}"

    def _move(self, op: IoOp) -> None:
        if op.kind == "write":
            self._path(op.offset).write_bytes(op.buffer)
            return
        if not self._path(op.offset).exists():  # never written: zeros
            op.buffer[:] = bytes(op.buffer.nbytes)
            return
        with self._path(op.offset).open("rb", buffering=0) as file:
            moved = file.readinto(op.buffer)
        if moved != op.buffer.nbytes:
            raise OSError(errno.EIO, f"moved only {moved} of {op.buffer.nbytes} bytes", str(self._path(op.offset)))

    def drop_page_cache(self) -> None:
        """Drop every chunk from the page cache."""
        for path in self._folder.glob("chunk-*"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
