"""Logs events that may happen thousands of times: the first at once, then one line per interval with their number."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable

INTERVAL_S = 30.0
SUBJECTS_MAX = 256
_VARIES = re.compile(r"[\d:'\"]")
_KIND_CHARACTERS_MAX = 80


def kind_of(error: Exception) -> str:
    """A subject for errors whose texts vary with a peer's data: the text up to its first number, colon or quote."""
    return _VARIES.split(str(error), maxsplit=1)[0][:_KIND_CHARACTERS_MAX]


class RateLimitedLog:
    """Warnings by subject: the first at once, further ones of the same subject at most once per `interval_s`, with the
    number of those left out. At most `SUBJECTS_MAX` subjects of one interval are distinguished; the rest share one."""

    def __init__(
        self, log: logging.Logger, interval_s: float = INTERVAL_S, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._log = log
        self._interval_s = interval_s
        self._now_s = now_s
        self._lock = threading.Lock()
        self._last: dict[str, tuple[float, int]] = {}  # subject -> (logged last, left out since)

    def warning(self, subject: str, message: str, *args: object) -> None:
        """Log `message % args`, or count it as left out. Warnings with the same `subject`, which is not shown, are
        alike."""
        self._log_once(logging.WARNING, subject, message, args)

    def exception(self, subject: str, message: str, *args: object) -> None:
        """As `warning`, but logs the handled exception with its traceback, as an error."""
        self._log_once(logging.ERROR, subject, message, args)

    def _log_once(self, level: int, subject: str, message: str, args: tuple[object, ...]) -> None:
        with self._lock:
            now_s = self._now_s()
            if subject not in self._last and len(self._last) >= SUBJECTS_MAX:
                self._last = {one: last for one, last in self._last.items() if now_s - last[0] < self._interval_s}
                subject = subject if len(self._last) < SUBJECTS_MAX else ""
            logged_s, left_out = self._last.get(subject, (-float("inf"), 0))
            if now_s - logged_s < self._interval_s:
                self._last[subject] = (logged_s, left_out + 1)
                return
            self._last[subject] = (now_s, 0)
        if left_out:
            message += " (and %d more like it in the last %.0f s)"
            args = (*args, left_out, now_s - logged_s)
        self._log.log(level, message, *args, exc_info=level >= logging.ERROR)
