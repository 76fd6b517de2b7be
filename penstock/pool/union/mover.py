"""Copies blocks that lie beside their owners to where everybody looks for them, in the background."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from penstock.core.keys import BlockKey
from penstock.core.layout import staging_bytes
from penstock.core.new_block import NewBlock
from penstock.io.memory import aligned_buffer
from penstock.pool.api import PoolError
from penstock.pool.losses import count_loss, note_error
from penstock.pool.union.children import Children
from penstock.pool.union.locations import Locations
from penstock.process.guarded_thread import GuardedWorker

WAITING_MAX = 1024  # pieces
PIECE_BLOCKS = 16
PIECE_BYTES = 8 << 20
TIME_SHARE = 0.1
TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Move:
    """A block that lies on one child and belongs on another one; `parent` is None where it is not known here."""

    key: BlockKey
    parent: BlockKey | None
    size_bytes: int
    position: int
    source: int
    target: int


class Mover:
    """Moves what `offer` got, a piece after the other.

    MOVE-1   Statement: A block that was moved has the bytes, checksum, MAC, tenant and parent that it was written with,
             and stays on the node that had it until that one evicts it: reads under way find it there.
    MOVE-2   Statement: At most TIME_SHARE of the time blocks are read to be moved; what does not fit into the queue
             stays where it is until it is looked up again.
    Verification: tests/pool/union/test_large_union.py.
    """

    def __init__(self, children: Children, locations: Locations) -> None:
        self._children, self._locations = children, locations
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._waiting: set[BlockKey] = set()
        self._worker: GuardedWorker | None = None  # from the first move on
        self.moved = 0

    def offer(self, moves: Sequence[Move]) -> None:
        """Move these blocks later; those that wait already are left out."""
        with self._lock:
            if self._closing.is_set():
                return
            try:
                worker = self._worker = self._worker or GuardedWorker("penstock-mover", WAITING_MAX)
            except (RuntimeError, MemoryError):  # the operating system starts no thread now
                count_loss("moves_dropped", len(moves))
                return
            new = [move for move in moves if move.key not in self._waiting]
            self._waiting.update(move.key for move in new)
        pieces: dict[tuple[int, int, int], list[Move]] = {}
        for move in new:
            pieces.setdefault((move.source, move.target, move.size_bytes), []).append(move)
        for (_, _, size_bytes), some in pieces.items():
            at_once = max(1, min(PIECE_BLOCKS, PIECE_BYTES // staging_bytes(size_bytes)))
            for at in range(0, len(some), at_once):
                piece = some[at : at + at_once]
                if not worker.put(partial(self._run, piece)):
                    count_loss("moves_dropped", len(piece))
                    self._ended(piece)

    def close(self, timeout_s: float) -> None:
        """Begin no further move, and end the thread within about `timeout_s`."""
        with self._lock:
            self._closing.set()
            worker = self._worker
        if worker is not None:
            worker.close(timeout_s)

    def _run(self, piece: list[Move]) -> None:
        if self._closing.is_set():
            return
        begin_s = time.monotonic()
        try:
            self._move(piece)
        except PoolError as error:
            note_error("move", self._children.all[piece[0].source].name, error)
        finally:
            self._ended(piece)
        self._closing.wait((time.monotonic() - begin_s) * (1 / TIME_SHARE - 1))

    def _ended(self, piece: list[Move]) -> None:
        with self._lock:
            self._waiting.difference_update(move.key for move in piece)

    def _move(self, piece: list[Move]) -> None:
        """Read the blocks of one piece and write them. Raises PoolError when the source does not answer."""
        source, target = self._children.all[piece[0].source], self._children.all[piece[0].target]
        if source.node is None or not source.up or not target.up:
            return
        size = piece[0].size_bytes
        origins = source.node.origins([move.key for move in piece], TIMEOUT_S)
        length = staging_bytes(size)
        memory = aligned_buffer(length * len(piece))
        reads = [_Read(memory[at * length : (at + 1) * length]) for at in range(len(piece))]
        for move, read in zip(piece, reads, strict=True):
            source.node.read_block(move.key, size, read.view, TIMEOUT_S, read.end)
        blocks, datas = [], []
        for move, origin, read in zip(piece, origins, reads, strict=True):
            error = read.wait()
            note_error("move", source.name, error)
            if error is None and origin is not None:
                parent = move.parent or origin.parent
                named = move.key, parent, size, move.position, origin.tenant, origin.rebuild_s, read.mac
                blocks.append(NewBlock(*named))
                datas.append(read.view)
        if not blocks:
            return
        target.pool.write_many(blocks, datas, TIMEOUT_S, partial(self._written, blocks, piece[0].target))

    def _written(self, blocks: list[NewBlock], target: int, errors: list[PoolError | None]) -> None:
        with self._children.lock:
            for block, error in zip(blocks, errors, strict=True):
                if error is None:
                    self._locations.note_stored(block.key, target)
                    self.moved += 1


class _Read:
    """A read that can be waited for."""

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.mac = b""
        self._error: PoolError | None = None
        self._ended = threading.Event()

    def end(self, checksum: int, mac: bytes, error: PoolError | None) -> None:
        """As `BlockEnded`."""
        self.mac, self._error = mac, error
        self._ended.set()

    def wait(self) -> PoolError | None:
        """How it ended."""
        if not self._ended.wait(2 * TIMEOUT_S):  # a pool calls back by the deadline, or when it is closed
            return PoolError("deadline", "a read of a block that is moved did not end")
        return self._error
