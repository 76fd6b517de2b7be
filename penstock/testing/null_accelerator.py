"""A device that does nothing: what is left is the time and the number of calls that the host spends on it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch

from penstock.device.accelerator import Accelerator, Event, Stream


class _Nothing:
    """A stream or an event that counts what is asked of it."""

    def __init__(self, calls: Counter[str]) -> None:
        self._calls = calls

    def record(self, stream: Any = None) -> None:
        self._calls["record"] += 1

    def synchronize(self) -> None:
        self._calls["synchronize"] += 1

    def query(self) -> bool:
        self._calls["query"] += 1
        return True

    def wait_event(self, event: Any) -> None:
        self._calls["wait_event"] += 1


class NullAccelerator(Accelerator):
    """Copies nothing and waits for nothing. `calls` counts what would be calls of a driver, by name; `copied_bytes` and
    `copies` say what batched copies were asked for."""

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__(device or torch.device("cuda", 0))
        self.calls: Counter[str] = Counter()
        self.copied_bytes = 0
        self.copies = 0

    def use(self) -> None:
        """Nothing: a driver is not called for a device that a thread is on already."""

    def new_stream(self) -> Stream:
        """See Accelerator."""
        return _Nothing(self.calls)

    def current_stream(self) -> Stream:
        """See Accelerator."""
        return _Nothing(self.calls)

    def new_event(self) -> Event:
        """See Accelerator."""
        return _Nothing(self.calls)

    def synchronize(self) -> None:
        """See Accelerator."""
        self.calls["device synchronize"] += 1

    def lock(self, address: int, size_bytes: int) -> None:
        """Nothing."""

    def unlock(self, address: int) -> None:
        """Nothing."""

    def copy(self, descriptors: np.ndarray, stream: Any, to_device: bool) -> None:
        """Counts."""
        self.calls["batched copy"] += 1
        self.copies += descriptors.shape[1]
        self.copied_bytes += int(descriptors[2].sum())
