"""A real block engine with faults on request: failing, hanging, lost or late operations and syncs."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Sequence

from penstock.io.api import BlockEngine, IoCompletion, IoOp


class FaultyEngine:
    """`fail`: kinds that end with EIO. `lose_writes`: writes are reported as done and never happen. `hold`: nothing
    comes back. `hold_sync`, `fail_sync`: syncs wait, or end with EIO."""

    def __init__(self, inner: BlockEngine, depth: int = 2) -> None:
        self.inner = inner
        self.name, self.capacity_bytes = inner.name, inner.capacity_bytes
        self.alignment_bytes, self.depth, self.notes = inner.alignment_bytes, depth, inner.notes
        self.fail: set[str] = set()
        self.lose_writes = self.fail_sync = self.closed = False
        self.hold = threading.Event()
        self.hold_sync = threading.Event()
        self.syncs = 0
        self.order: list[int] = []  # offsets as they were submitted
        self._held: list[IoCompletion] = []
        self._news = threading.Event()

    def register(self, buffer: memoryview) -> None:
        self.inner.register(buffer)

    def submit(self, ops: Sequence[IoOp]) -> None:
        for op in ops:
            self.order.append(op.offset)
            if op.kind in self.fail:
                self._held.append(IoCompletion(op.tag, OSError(errno.EIO, "injected")))
            elif op.kind == "write" and self.lose_writes:
                self._held.append(IoCompletion(op.tag, None))
            else:
                self.inner.submit([op])

    def poll(self, timeout_s: float) -> list[IoCompletion]:
        wait_s = 0.0 if self._held and not self.hold.is_set() else timeout_s
        self._held.extend(self.inner.poll(wait_s) if self.inner.in_flight() else [])
        if self.hold.is_set():
            self._news.wait(timeout_s)
            self._news.clear()
            return []
        found, self._held = self._held, []
        return found

    def fail_held(self, count: int) -> None:
        """The first operations of those that are held end with EIO. While `hold` is set."""
        until_s = time.monotonic() + 30.0
        while len(self._held) < count and time.monotonic() < until_s:
            threading.Event().wait(0.002)
        for at in range(count):
            self._held[at] = IoCompletion(self._held[at].tag, OSError(errno.EIO, "injected"))

    def wake(self) -> None:
        self._news.set()
        self.inner.wake()

    def in_flight(self) -> int:
        return self.inner.in_flight() + len(self._held)

    def sync(self) -> None:
        self.syncs += 1
        while self.hold_sync.is_set():
            threading.Event().wait(0.002)
        if self.fail_sync:
            raise OSError(errno.EIO, "injected")
        self.inner.sync()

    def close(self, timeout_s: float) -> None:
        self.closed = True
        self.inner.close(timeout_s)
