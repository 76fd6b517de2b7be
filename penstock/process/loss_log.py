"""Logs a line for each loss counter that has grown; the counters belong to others, such as a scheduler core."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from penstock.process.rate_limited_log import RateLimitedLog


class LossLog:
    """Watches loss counters. Threading: one thread at a time."""

    def __init__(self, log: logging.Logger, texts: Mapping[str, str], prefix: str = "") -> None:
        """`texts`: name of a loss counter -> what was lost and why. `prefix` begins each line."""
        self._rare = RateLimitedLog(log)
        self._texts = texts
        self._prefix = prefix
        self._logged = dict.fromkeys(texts, 0)

    def look(self, counts: Mapping[str, int]) -> None:
        """Log the counters that have grown since the last call, with their totals, each at a bounded rate."""
        for name, text in self._texts.items():
            count = counts.get(name, 0)
            if count > self._logged[name]:
                self._logged[name] = count
                self._rare.warning(name, "%s%d %s", self._prefix, count, text)
