"""Whether copies from and to vLLM's cache are allowed: not while vLLM sleeps, when its memory is released."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

DRAIN_TIMEOUT_S = 60.0


class CopyGate:
    """Initially open. Threading: copies from any threads, `close` and `open` from vLLM's thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._copies = 0
        self._closed = False

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """A context in which the gate does not close. Raises RuntimeError if it is closed: the copy has failed."""
        with self._changed:
            if self._closed:
                raise RuntimeError("vLLM sleeps: its cache is not in memory")
            self._copies += 1
        try:
            yield
        finally:
            with self._changed:
                self._copies -= 1
                self._changed.notify_all()

    def close(self, timeout_s: float = DRAIN_TIMEOUT_S) -> None:
        """Start no new copies, and wait until the running ones end. If that takes longer than `timeout_s`, reopens and
        raises RuntimeError: memory that is being copied to must not be released."""
        with self._changed:
            self._closed = True
            if not self._changed.wait_for(lambda: not self._copies, timeout_s):
                self._closed = False
                raise RuntimeError(f"{self._copies} copies of Penstock's did not end within {timeout_s:g} s")

    def open(self) -> None:
        """vLLM's memory is valid again: copies may start."""
        with self._changed:
            self._closed = False
