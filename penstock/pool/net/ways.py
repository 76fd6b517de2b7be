"""The ways by which blocks travel between pool nodes and this process: in messages, one-sided, or one-sided into a
device's memory; as metrics show them."""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

from penstock.process.kind_counts import KindCounts

MESSAGES, ONE_SIDED, DEVICE = "messages", "one-sided", "device"

_read_bytes, _written_bytes = KindCounts(), KindCounts()
_links: weakref.WeakValueDictionary[str, Way] = weakref.WeakValueDictionary()
_lock = threading.Lock()


class Way(Protocol):
    """One-sided transfers from and to one node."""

    @property
    def state(self) -> str:
        """How blocks travel one-sided, or "off: " and why they do not."""


def count_read(way: str, size_bytes: int) -> None:
    """Count a block that was read."""
    _read_bytes.add(way, size_bytes)


def read_bytes() -> dict[str, int]:
    """Bytes read from pool nodes since the process started, by way; "device" only where blocks landed there."""
    return {MESSAGES: 0, ONE_SIDED: 0} | _read_bytes.so_far()


def count_written(way: str, size_bytes: int) -> None:
    """Count blocks that were written."""
    _written_bytes.add(way, size_bytes)


def written_bytes() -> dict[str, int]:
    """Bytes written to pool nodes since the process started, by way."""
    return {MESSAGES: 0, ONE_SIDED: 0} | _written_bytes.so_far()


def note_link(place: str, way: Way) -> None:
    """The node at this address is reached by `way`, as long as that exists."""
    with _lock:
        _links[place] = way


def states() -> dict[str, str]:
    """For each node that is connected: how its blocks travel one-sided, or why not."""
    with _lock:
        found = dict(_links)
    return {place: way.state for place, way in found.items()}
