"""Copies blocks that lie beside their owners to where everybody looks for them, in the background."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial

from penstock.core.keys import BlockKey
from penstock.core.new_block import NewBlock
from penstock.pool.api import PoolError
from penstock.pool.losses import count_loss, note_error
from penstock.pool.union.block_copier import Move, copy_piece, pause_after, pieces_of
from penstock.pool.union.children import Children
from penstock.pool.union.locations import Locations
from penstock.process.guarded_thread import GuardedWorker

WAITING_MAX = 1024  # pieces


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
        for some in pieces.values():
            for piece in pieces_of(some):
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

    def _run(self, piece: Sequence[Move]) -> None:
        if self._closing.is_set():
            return
        begin_s = time.monotonic()
        try:
            copy_piece(self._children, piece, self._written)
        except PoolError as error:
            note_error("move", self._children.all[piece[0].source].name, error)
        finally:
            self._ended(piece)
        self._closing.wait(pause_after(begin_s))

    def _ended(self, piece: Sequence[Move]) -> None:
        with self._lock:
            self._waiting.difference_update(move.key for move in piece)

    def _written(self, target: int, blocks: Sequence[NewBlock], errors: Sequence[PoolError | None]) -> None:
        with self._children.lock:
            for block, error in zip(blocks, errors, strict=True):
                if error is None:
                    self._locations.note_stored(block.key, target)
                    self.moved += 1
