"""Whether vLLM's cache may be copied from and to: not while vLLM sleeps and its memory is somebody else's."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

DRAIN_TIMEOUT_S = 60.0


class CopyGate:
    """Open at first. Threading: copies from any threads, `close` and `open` from vLLM's."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._copies = 0
        self._closed = False

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """Within, the gate does not close. Raises RuntimeError where it is closed: the copy has failed."""
        with self._changed:
            if self._closed:
                raise RuntimeError("vLLM sleeps: its cache is not there")
            self._copies += 1
        try:
            yield
        finally:
            with self._changed:
                self._copies -= 1
                self._changed.notify_all()

    def close(self, timeout_s: float = DRAIN_TIMEOUT_S) -> None:
        """No copy begins any more; returns when none is under way. Raises RuntimeError, and is open again, when that
        takes longer: memory that is copied to must not be given up."""
        with self._changed:
            self._closed = True
            if not self._changed.wait_for(lambda: not self._copies, timeout_s):
                self._closed = False
                raise RuntimeError(f"{self._copies} copies of Penstock's did not end within {timeout_s:g} s")

    def open(self) -> None:
        """vLLM's memory is its own again: copies go on."""
        with self._changed:
            self._closed = False
