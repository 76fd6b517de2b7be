"""What this process holds: its memory, threads and open files, for tests that it stays flat."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

WAIT_S = 60.0


@dataclass(frozen=True)
class Figures:
    threads: int
    files: int
    resident_bytes: int


def figures() -> Figures:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Figures(threading.active_count(), len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGE_SIZE"))


def back_to(before: Figures, grown_bytes_max: int, settled: Callable[[], bool] = lambda: True) -> None:
    """Wait until there are no more threads and files than before, and `settled` holds; then memory has grown by
    `grown_bytes_max` at most."""
    end = time.monotonic() + WAIT_S
    now = figures()
    while now.threads > before.threads or now.files > before.files or not settled():
        assert time.monotonic() < end, f"{before} before, {now} after {WAIT_S} s"
        time.sleep(0.02)
        now = figures()
    assert now.resident_bytes - before.resident_bytes <= grown_bytes_max, f"{before} before, {now} after"
