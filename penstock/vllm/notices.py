"""Notices of ended loads that vLLM has not acknowledged: sent over the links, and again with steps if links are
gone."""

from __future__ import annotations

import threading

from penstock.vllm.link import Finished, Notice


class Notices:
    """Numbers notices and stores them until vLLM acknowledged the load, so that a notice lost by a broken link can be
    sent with a step. At most one per load under way. Threading: any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, Notice] = {}
        self._next = 0

    def new(self, finished: Finished) -> Notice:
        """Number the notice of an ended load; it is stored until acknowledged."""
        with self._lock:
            notice = Notice(self._next, finished)
            self._next += 1
            self._open[finished.request_id] = notice
        return notice

    def acknowledged(self, request_id: str) -> None:
        """vLLM knows that this request's load has ended."""
        with self._lock:
            self._open.pop(request_id, None)

    def open(self) -> list[Notice]:
        """The notices that vLLM has not acknowledged, oldest first."""
        with self._lock:
            return sorted(self._open.values(), key=lambda notice: notice.number)
