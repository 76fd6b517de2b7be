"""Loads that are over and that vLLM has not taken note of: told over the links, and once more when those are gone."""

from __future__ import annotations

import threading

from penstock.vllm.link import Finished, Notice


class Notices:
    """Numbers notices and keeps them until vLLM acknowledged the load, so that one which a broken link lost can go with
    a step instead. As many as loads are under way. Threading: any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, Notice] = {}
        self._next = 0

    def new(self, finished: Finished) -> Notice:
        """Number a load that is over; kept until it is acknowledged."""
        with self._lock:
            notice = Notice(self._next, finished)
            self._next += 1
            self._open[finished.request_id] = notice
        return notice

    def acknowledged(self, request_id: str) -> None:
        """vLLM has heard that this request's load is over."""
        with self._lock:
            self._open.pop(request_id, None)

    def open(self) -> list[Notice]:
        """Those that vLLM has not acknowledged, the oldest first."""
        with self._lock:
            return sorted(self._open.values(), key=lambda notice: notice.number)
