"""The `threads` block engine: threads with `preadv` and `pwritev`, for systems where io_uring cannot be used."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import time
from collections.abc import Sequence
from functools import partial

from penstock.io.api import IoCompletion, IoOp
from penstock.io.device import Device
from penstock.io.device_engine import DeviceEngine
from penstock.io.memory import checked_addresses
from penstock.process.guarded_thread import GuardedWorker, count_failure

ALIGNMENT_BYTES = 4096
THREADS_MAX = 16
RELEASE_S = 10.0


class ThreadEngine(DeviceEngine):
    """Block engine over threads (contract: `penstock.io.api.BlockEngine`). Opened by `penstock.io.open_engine`.

    At most `THREADS_MAX` operations are in the device at once; the others wait in the engine.
    """

    name = "threads"

    def __init__(self, device: Device, depth: int) -> None:
        """Owns `device` once it returns."""
        super().__init__(device, depth, ALIGNMENT_BYTES)
        self._in_flight = 0
        self._woken = False
        self._done: queue.SimpleQueue[IoCompletion | None] = queue.SimpleQueue()
        self._worker = GuardedWorker("penstock-io", depth, threads=min(depth, THREADS_MAX))

    def _work(self, op: IoOp) -> None:
        self._done.put(IoCompletion(op.tag, self._move(op)))

    def _move(self, op: IoOp) -> OSError | None:
        """Move all bytes of `op`; returns why that failed, or None."""
        at = 0
        try:
            fd, length = self._device.fd, op.buffer.nbytes
            while at < length:
                rest = [op.buffer[at:]]
                moved = (
                    os.preadv(fd, rest, op.offset + at) if op.kind == "read" else os.pwritev(fd, rest, op.offset + at)
                )
                at += moved
                if moved == 0 or (at < length and at % ALIGNMENT_BYTES):
                    return self._error(op, at, errno.EIO, f"moved only {at} bytes (was the device cut short?)")
        except OSError as error:
            return self._error(op, at, error.errno or errno.EIO, error.strerror or str(error))
        except Exception as error:  # noqa: BLE001 (such as a released buffer: the operation fails, the thread goes on)
            count_failure("penstock-io")
            return OSError(errno.EIO, f"{op.kind} at {op.offset + at}: {error!r}", str(self._device.path))
        return None

    def _error(self, op: IoOp, at: int, number: int, reason: str) -> OSError:
        text = f"{op.kind} of {op.buffer.nbytes - at} bytes at {op.offset + at}: {reason}"
        return OSError(number, text, str(self._device.path))

    def register(self, buffer: memoryview) -> None:
        """Do nothing: here the kernel pins buffers at each I/O."""
        self._check_open()

    def submit(self, ops: Sequence[IoOp]) -> None:
        """Queue operations for the threads. Raises QueueFull beyond `depth`."""
        self._check_open()
        checked_addresses(ops, self.in_flight(), self.depth, self.capacity_bytes, ALIGNMENT_BYTES)
        self._in_flight += len(ops)
        queued = [self._worker.put(partial(self._work, op)) for op in ops]
        assert all(queued), "more than `depth` operations are in flight"

    def poll(self, timeout_s: float) -> list[IoCompletion]:
        """Operations that have ended; waits at most `timeout_s` for the first one."""
        done, self._ended = self._ended, []
        deadline_s = time.monotonic() + timeout_s
        with contextlib.suppress(queue.Empty):
            while not done and self._in_flight and not self._woken and (left_s := deadline_s - time.monotonic()) > 0:
                self._take(self._done.get(timeout=left_s), done)
            while self._in_flight:
                self._take(self._done.get_nowait(), done)
        self._woken = False
        return done

    def _take(self, ended: IoCompletion | None, done: list[IoCompletion]) -> None:
        if ended is not None:
            done.append(ended)
            self._in_flight -= 1

    def wake(self) -> None:
        """End a wait of `poll`, from any thread."""
        if not self._woken:
            self._woken = True
            self._done.put(None)  # ends the wait of a poll in progress; a late one is ignored

    def _in_device(self) -> int:
        return self._in_flight

    def _release(self) -> None:
        self._worker.close(RELEASE_S)  # the threads are idle by now
