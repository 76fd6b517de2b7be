"""Copies of blocks between host and device, one batched copy for all that go together."""

from __future__ import annotations

import numpy as np

from penstock.device.accelerator import Accelerator, Event


class CopyLane:
    """The copies of one direction, on a stream of their own. Several threads may use it, each for its own copies; two
    enqueued by one thread begin in that order."""

    def __init__(self, accelerator: Accelerator, to_device: bool) -> None:
        self._accelerator = accelerator
        self._to_device = to_device
        self._stream = accelerator.new_stream()

    def enqueue(self, descriptors: np.ndarray) -> Event:
        """Begin copies `[3, n]` (targets, sources, bytes); gives the event behind them. When this raises, none of them
        is under way any more."""
        accelerator = self._accelerator
        accelerator.use()
        event = accelerator.new_event()
        try:
            if descriptors.shape[1]:
                accelerator.copy(descriptors, self._stream, self._to_device)
            event.record(self._stream)
        except BaseException:
            self.drain()
            raise
        return event

    def finish(self, event: Event | None) -> None:
        """Wait for what `enqueue` gave (None: nothing). When this raises, nothing is under way any more, or the device
        is lost."""
        try:
            if event is not None:
                self._accelerator.use()
                event.synchronize()
        except BaseException:
            self.drain()
            raise

    def copy(self, descriptors: np.ndarray) -> None:
        """Begin copies and wait for them. Whether this returns or raises, nothing of them is under way any more."""
        self.finish(self.enqueue(descriptors))

    def drain(self) -> None:
        """Wait for everything on the lane."""
        self._stream.synchronize()


def descriptors_of(targets: np.ndarray, sources: np.ndarray, size_bytes: int) -> np.ndarray:
    """`[3, n]` of addresses `[n]` of targets and sources, and the bytes of each copy."""
    made = np.empty((3, len(targets)), np.int64)
    made[0], made[1], made[2] = targets, sources, size_bytes
    return made
