"""The interface of every block engine: submit reads and writes by address, poll for completions.

Threading: one engine belongs to one thread at a time (its pool member's worker); `register`, `submit`, `poll` and
`close` must not run concurrently with each other. `sync` and `wake` may be called from any thread at any time. Nothing
is retried inside an engine; the caller decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol


class QueueFull(RuntimeError):
    """A submit would bring more operations in flight than `depth`; none of it was submitted."""


class IoOp(NamedTuple):
    """One read or write of `len(buffer)` bytes at byte `offset` of the device.

    `offset`, the length and the buffer's address are multiples of the engine's `alignment_bytes`.
    The completion has the same `tag`. Until then the engine owns the buffer.
    """

    kind: Literal["read", "write"]
    offset: int
    buffer: memoryview
    tag: Any


class IoCompletion(NamedTuple):
    """The end of one operation: all of its bytes were moved (`error is None`), or it failed with `error`.

    A short read or write is an error (EIO), never a success.
    """

    tag: Any
    error: OSError | None


class BlockEngine(Protocol):
    """A device (slab file, block device, NVMe namespace) read and written by address."""

    name: str
    capacity_bytes: int
    alignment_bytes: int
    depth: int
    notes: list[str]  # features that this engine cannot use here, and why; for the user

    def register(self, buffer: memoryview) -> None:
        """Announce memory that later operations will use (pinned once, not at each I/O). Optional."""

    def submit(self, ops: Sequence[IoOp]) -> None:
        """Start operations, in no promised order. Raises QueueFull, or ValueError for a bad offset, length or
        alignment; in both cases none of `ops` has started."""

    def poll(self, timeout_s: float) -> list[IoCompletion]:
        """Completions so far; waits at most `timeout_s` for the first one. Empty when none came, when nothing is in
        flight (then at once), or after a `wake`."""

    def wake(self) -> None:
        """Make the `poll` in progress return early, or else the next one. From any thread; several calls before that
        count as one. Nothing on a closed engine."""

    def in_flight(self) -> int:
        """Operations submitted and not yet returned by `poll`."""

    def sync(self) -> None:
        """Make completed writes durable (fdatasync, NVMe flush). From any thread, also while another one submits and
        polls; operations that completed before the call are durable after it. Raises OSError."""

    def close(self, timeout_s: float) -> None:
        """Wait for operations in flight (at most `timeout_s`), then release the device. Raises TimeoutError if some
        have not ended: their buffers must not be reused."""
