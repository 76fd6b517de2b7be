"""vLLM's first-come queue of waiting requests, kept in the order of the scheduler core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.v1.core.sched.request_queue import FCFSRequestQueue
from vllm.v1.request import Request


class WaitingQueue(FCFSRequestQueue):  # type: ignore[misc]
    """Sorted anew only when a request came since, or when the order itself changed. What vLLM takes out while it
    schedules and puts back leaves the order as it was."""

    def __init__(self) -> None:
        super().__init__()
        self._came = False

    def add_request(self, request: Request) -> None:
        """A request arrived, or its load ended."""
        self._came = True
        super().add_request(request)

    def prepend_request(self, request: Request) -> None:
        """A request was preempted."""
        self._came = True
        super().prepend_request(request)

    def sort(self, order: Callable[[Request], Any], order_changed: bool) -> None:
        """Sort by `order`, if it changed or a request came since the last time."""
        if (self._came or order_changed) and len(self) > 1:
            ordered = sorted(self, key=order)
            self.clear()
            self.extend(ordered)
        self._came = False
