"""What is lost inside vLLM, by the scheduler core's count of it: `penstock.process.loss_log` logs each that grows."""

from __future__ import annotations

PREFIX = "Penstock: "  # these lines are among vLLM's own

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
