"""Copies blocks of one child of a union to others, as they were written, through memory of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from penstock.core.keys import BlockKey
from penstock.core.layout import staging_bytes
from penstock.core.new_block import NewBlock
from penstock.core.pool.copies import copy_of, original_of
from penstock.io.memory import aligned_buffer
from penstock.pool.api import PoolError
from penstock.pool.losses import note_error
from penstock.pool.union.children import Children

PIECE_BLOCKS = 16
PIECE_BYTES = 8 << 20
TIME_SHARE = 0.1  # of a thread that copies
TIMEOUT_S = 10.0

Written = Callable[[int, Sequence[NewBlock], Sequence[PoolError | None]], None]
"""Takes the number of a child, blocks that were written to it, and how each write ended."""


@dataclass(frozen=True, slots=True)
class Move:
    """A block that lies on one child and is to lie on another one too; `parent` is None where it is not known here.
    `copy`: it becomes a copy there (`core.pool.copies`), else an original."""

    key: BlockKey
    parent: BlockKey | None
    size_bytes: int
    position: int
    source: int
    target: int
    copy: bool = False


def pieces_of(moves: Sequence[Move]) -> list[Sequence[Move]]:
    """Moves of one size and source, in parts that are read at once."""
    at_once = max(1, min(PIECE_BLOCKS, PIECE_BYTES // staging_bytes(moves[0].size_bytes))) if moves else 1
    return [moves[at : at + at_once] for at in range(0, len(moves), at_once)]


def pause_after(begin_s: float) -> float:
    """How long a thread rests that copied since `begin_s`, for TIME_SHARE."""
    return (time.monotonic() - begin_s) * (1 / TIME_SHARE - 1)


def copy_piece(children: Children, piece: Sequence[Move], written: Written) -> int:
    """Read the blocks of one piece, and begin to write them; returns to how many children, each of which `written`
    hears of once. Raises PoolError when the source does not answer."""
    source, size = children.all[piece[0].source], piece[0].size_bytes
    if source.node is None or not source.up:
        return 0
    origins = source.node.origins([move.key for move in piece], TIMEOUT_S)
    length = staging_bytes(size)
    memory = aligned_buffer(length * len(piece))
    reads = [_Read(memory[at * length : (at + 1) * length]) for at in range(len(piece))]
    for move, read in zip(piece, reads, strict=True):
        source.node.read_block(move.key, size, read.view, TIMEOUT_S, read.end)
    writes: dict[int, tuple[list[NewBlock], list[memoryview]]] = {}
    for move, origin, read in zip(piece, origins, reads, strict=True):
        error = read.wait()
        note_error("move", source.name, error)
        if error is None and origin is not None and children.all[move.target].up:
            tenant = copy_of(origin.tenant) if move.copy else original_of(origin.tenant)
            named = move.key, move.parent or origin.parent, size, move.position, tenant, origin.rebuild_s, read.mac
            blocks, datas = writes.setdefault(move.target, ([], []))
            blocks.append(NewBlock(*named))
            datas.append(read.view)
    for target, (blocks, datas) in writes.items():
        children.all[target].pool.write_many(blocks, datas, TIMEOUT_S, partial(written, target, blocks))
    return len(writes)


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
