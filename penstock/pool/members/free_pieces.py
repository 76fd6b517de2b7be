"""Reads and writes pieces of a device's free space through its engine, to measure its bandwidth."""

from __future__ import annotations

import time
from typing import Literal

import numpy as np

from penstock.io.api import BlockEngine, IoOp
from penstock.io.memory import aligned_buffer
from penstock.pool.api import PoolError

MEASURE_BYTES = 256 << 20
BUFFERS_BYTES = 32 << 20
DEPTH_MAX = 16
ANSWER_S = 10.0


class FreePieces:
    """A range of a device in pieces. The calling thread owns the engine."""

    def __init__(self, engine: BlockEngine, name: str, free: tuple[int, int], piece_bytes: int) -> None:
        """`free` is `(offset, length)`. Raises PoolError ("full") when no piece fits into it."""
        self.piece_bytes = piece_bytes
        self._engine, self._name = engine, name
        offset, length = free
        if piece_bytes < 1 or length < piece_bytes:
            raise PoolError("full", f"{name} has no free space of {piece_bytes} bytes to measure in")
        pieces = max(1, min(length, MEASURE_BYTES) // piece_bytes)
        self._offsets = [offset + i * piece_bytes for i in range(pieces)]
        depth = max(1, min(DEPTH_MAX, engine.depth, pieces, BUFFERS_BYTES // piece_bytes))
        memory = aligned_buffer(depth * piece_bytes)
        memory[:] = np.random.default_rng(1).bytes(len(memory))  # zeros would be too fast on a drive that compresses
        self._idle = [memory[i * piece_bytes : (i + 1) * piece_bytes] for i in range(depth)]
        self._written = 0  # pieces written so far, from the start of the range

    def move(self, direction: Literal["read", "write"], budget_s: float) -> float:
        """Bytes per second over about `budget_s`; reads only pieces that were written before, if there are any. Raises
        PoolError ("device")."""
        pieces = len(self._offsets) if direction == "write" else self._written or len(self._offsets)
        begin_s = answered_s = now_s = time.monotonic()
        started = ended = 0
        while True:
            while self._idle and (started == 0 or now_s - begin_s < budget_s):
                buffer = self._idle.pop()
                self._engine.submit([IoOp(direction, self._offsets[started % pieces], buffer, buffer)])
                started += 1
            if started == ended:
                break
            for completion in self._engine.poll(1.0):
                if completion.error is not None:
                    raise PoolError("device", f"{direction} on {self._name}: {completion.error}")
                self._idle.append(completion.tag)
                ended, answered_s = ended + 1, time.monotonic()
            now_s = time.monotonic()
            if now_s - answered_s > ANSWER_S:
                raise PoolError("device", f"{self._name} has not answered for {ANSWER_S:.0f} s")
        if direction == "write":
            self._written = max(self._written, min(ended, pieces))
        return ended * self.piece_bytes / max(now_s - begin_s, 1e-9)
