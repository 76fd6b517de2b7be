"""Saves that are written together: blocks that were copied out of device memory wait for others on their way out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from penstock.core.operations import Save
from penstock.engine.transfers import End

Saved = tuple[Save, End]


class SaveSpans:
    """Calls `write(saves)` with at most `span_blocks` saves of one tenant: as soon as there are so many, and when no
    page is being copied any more. Any thread may call; `write` is called on the thread that copied the last page."""

    def __init__(self, span_blocks: int, write: Callable[[Sequence[Saved]], None]) -> None:
        self._span_blocks = span_blocks
        self._write = write
        self._lock = threading.Lock()
        self._copying = 0
        self._ready: list[Saved] = []

    def copying(self) -> None:
        """A page is being copied into its slot; `copied` must follow."""
        with self._lock:
            self._copying += 1

    def copied(self, saved: Saved | None) -> None:
        """A page is in its slot (None: its copy failed)."""
        with self._lock:
            self._copying -= 1
            if saved is not None:
                self._ready.append(saved)
            if self._copying and len(self._ready) < self._span_blocks:
                return
            ready, self._ready = self._ready, []
        by_tenant: dict[bytes, list[Saved]] = {}
        for one in ready:
            by_tenant.setdefault(one[0].block.tenant, []).append(one)
        for saves in by_tenant.values():
            self._write(saves)
