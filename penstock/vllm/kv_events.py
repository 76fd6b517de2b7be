"""The pool's KV events as vLLM's own, which vLLM publishes with those of its own blocks."""

from __future__ import annotations

import msgspec
from vllm.distributed import kv_events

from penstock.pool.kv_events import Event, KvEventLog

EVENTS_PER_STEP = 256  # made on vLLM's scheduler thread, a few microseconds each


def vllm_events(log: KvEventLog) -> list[kv_events.KVCacheEvent]:
    """What happened since the last call, EVENTS_PER_STEP events or a few more."""
    return [_vllm_event(event) for event in log.take(EVENTS_PER_STEP)]


def _vllm_event(event: Event) -> kv_events.KVCacheEvent:
    """With the fields that this version of vLLM has."""
    kind = getattr(kv_events, type(event).__name__)
    known = kind.__struct_fields__
    return kind(**{name: value for name, value in msgspec.structs.asdict(event).items() if name in known})
