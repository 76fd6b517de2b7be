"""Each hit or save that is lost says so: a line of the log where one of the scheduler core's counts of losses grows."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from penstock.rate_limited_log import RateLimitedLog

LOSSES = {
    "lookup_failures": "lookups failed: the pool could not be asked, and requests are computed",
    "lookups_late": "lookups were late: requests did not wait for them any longer (lookup_timeout_s)",
    "fetch_failures": "blocks could not be fetched, and are computed",
    "upload_failures": "uploads failed: their blocks are computed",
    "hits_of_other_size": "hits were left out: the pool's blocks have another size than this engine's",
    "hits_withdrawn": "blocks that vLLM had been offered were lost before it gave pages for them, and are computed",
    "requests_without_loads": "requests load nothing: more wait than max_waiting allows",
    "saves_failed": "blocks could not be saved",
    "saves_dropped": "blocks were not saved: vLLM needed their place, or too many were queued",
    "saves_incomplete": "blocks were not saved: a sliding window had let go of a part of them",
    "requests_not_followed": "requests are served without the pool: an id in use, or Penstock failed for them",
    "loads_refused": "loads did not begin, and are computed: vLLM gave other blocks than it was offered",
    "copies_late": "copies in a worker take long; the pages of what they load stay taken until they end",
}


class LossLog:
    """Threading: one thread at a time."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = RateLimitedLog(log)
        self._told: dict[str, int] = {}

    def look(self, counters: Mapping[str, int]) -> None:
        """Say which counts have grown since the last call, each at most once per interval."""
        for name, text in LOSSES.items():
            count = counters.get(name, 0)
            if count > self._told.get(name, 0):
                self._told[name] = count
                self._log.warning(name, "Penstock: %d %s", count, text)
