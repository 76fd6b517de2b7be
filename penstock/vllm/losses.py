"""Log lines for losses inside vLLM, by the name of their counter; `penstock.process.loss_log` logs each that grows."""

from __future__ import annotations

PREFIX = "Penstock: "  # these lines appear in vLLM's log

LOSSES = {
    "lookup_failures": "lookups failed: the pool did not answer, and requests are computed",
    "lookups_late": "lookups were late: requests stopped waiting for them (lookup_timeout_s)",
    "fetch_failures": "blocks could not be fetched, and are computed",
    "upload_failures": "uploads failed: their blocks are computed",
    "hits_of_other_size": "hits were ignored: the pool's blocks have another size than this engine's",
    "hits_withdrawn": "blocks offered to vLLM were lost before it allocated pages for them, and are computed",
    "requests_without_loads": "requests load nothing: more requests wait than max_waiting allows",
    "saves_failed": "blocks could not be saved",
    "saves_dropped": "blocks were not saved: vLLM needed their pages, or too many were queued",
    "saves_incomplete": "blocks were not saved: a sliding window had freed a part of them",
    "requests_not_followed": "requests are served without the pool: an id in use, or Penstock failed for them",
    "loads_refused": "loads did not begin, and are computed: vLLM allocated other blocks than it was offered",
    "hand_off_failures": "blocks were not handed over: their decode hosts load or compute them",
    "copies_late": "copies in a worker take long; the pages that they load stay in use until they end",
}
