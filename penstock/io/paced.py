"""A block engine that emulates a slower device: all bytes really move, but completions are delayed."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Sequence

from penstock.io.api import BlockEngine, IoCompletion, IoOp, QueueFull
from penstock.pacing import PaceClock


class PacedEngine:
    """Contract: `penstock.io.api.BlockEngine`. `bytes_per_s` 0: no delay."""

    def __init__(self, inner: BlockEngine, bytes_per_s: float, clock: PaceClock | None = None) -> None:
        """Owns `inner` from now on. Raises ValueError for a negative bandwidth."""
        if bytes_per_s < 0:
            raise ValueError(f"bytes_per_s is {bytes_per_s}; it must be at least 0")
        self.name = inner.name
        self.capacity_bytes = inner.capacity_bytes
        self.alignment_bytes = inner.alignment_bytes
        self.depth = inner.depth
        self.notes = inner.notes
        self.bytes_per_s = bytes_per_s
        self.clock = clock or PaceClock()
        self._inner = inner
        self._woken = threading.Event()
        self._numbers = itertools.count()
        self._due_s: dict[int, float] = {}  # operation in the inner engine -> when it may end
        self._tags: dict[int, object] = {}
        self._held: list[
            tuple[float, int, IoCompletion]
        ] = []  # ended in the inner engine, by the time when they may end

    def register(self, buffer: memoryview) -> None:
        """Register the buffer with the inner engine."""
        self._inner.register(buffer)

    def submit(self, ops: Sequence[IoOp]) -> None:
        """Submit to the inner engine. Raises QueueFull beyond `depth`, including delayed operations."""
        if self.in_flight() + len(ops) > self.depth:
            raise QueueFull(f"{len(ops)} operations on top of {self.in_flight()} in flight; the depth is {self.depth}")
        now_s = time.monotonic()
        numbered = [IoOp(op.kind, op.offset, op.buffer, next(self._numbers)) for op in ops]
        self._inner.submit(numbered)
        for op, inside in zip(ops, numbered, strict=True):
            self._tags[inside.tag] = op.tag
            seconds = op.buffer.nbytes / self.bytes_per_s if self.bytes_per_s else 0.0
            self._due_s[inside.tag] = self.clock.turn(seconds, now_s) if seconds else now_s

    def poll(self, timeout_s: float) -> list[IoCompletion]:
        """Operations whose delay has passed; waits at most `timeout_s` for the first one."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            self._collect(0.0)
            now_s = time.monotonic()
            done = self._due(now_s)
            if done or now_s >= deadline_s or not self.in_flight() or self._woken.is_set():
                self._woken.clear()
                return done
            until_s = min(deadline_s, self._held[0][0]) if self._held else deadline_s
            if self._inner.in_flight():
                self._collect(max(0.0, until_s - now_s))
            else:
                self._woken.wait(max(0.0, until_s - now_s))

    def wake(self) -> None:
        """End a wait of `poll`, from any thread."""
        self._woken.set()
        self._inner.wake()

    def _collect(self, timeout_s: float) -> None:
        if self._inner.in_flight():
            for completion in self._inner.poll(timeout_s):
                due_s = self._due_s.pop(completion.tag)
                ended = IoCompletion(self._tags.pop(completion.tag), completion.error)
                heapq.heappush(self._held, (due_s, completion.tag, ended))

    def _due(self, now_s: float) -> list[IoCompletion]:
        done = []
        while self._held and self._held[0][0] <= now_s:
            done.append(heapq.heappop(self._held)[2])
        return done

    def in_flight(self) -> int:
        """Operations that were submitted and that `poll` has not returned."""
        return len(self._due_s) + len(self._held)

    def sync(self) -> None:
        """Make completed writes durable, without a delay."""
        self._inner.sync()

    def close(self, timeout_s: float) -> None:
        """As in the contract; delayed operations can then be fetched with `poll` at once."""
        self._collect(0.0)
        self._inner.close(timeout_s)
        while self._inner.in_flight():
            self._collect(0.0)
        self._held = [(0.0, number, ended) for _, number, ended in self._held]
