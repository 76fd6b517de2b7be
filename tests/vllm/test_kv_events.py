"""The connector's host notes what came into the pool and what was found there, with the tokens of vLLM's requests."""

from __future__ import annotations

from penstock.pool.kv_events import BlockStored, KvEventLog
from penstock.vllm.settings import Settings
from tests.asking import wait_until
from tests.pool.test_kv_events import Reader
from tests.vllm.test_vllm_sides import BLOCK, Rig

SETTINGS = Settings(memory=(16 << 20,), staging_bytes=1 << 20, lookup_timeout_s=10.0)


def test_saved_blocks_are_announced_and_found_again() -> None:
    log, reader, stored = KvEventLog(clears=False), Reader(), list[BlockStored]()
    rig = Rig(SETTINGS, events=log)
    try:
        rig.submit("a", 3)
        wait_until(lambda: rig.host.matched("a", 0) is not None, "the pool is asked")
        for place in range(6):
            rig.fill(place, place)
        rig.save("a", 3)

        def heard() -> bool:
            events = log.take(10)
            reader.hear(events)
            stored.extend(event for event in events if isinstance(event, BlockStored))
            return len(stored) == 3

        wait_until(heard, "three blocks are announced")
        assert [event.token_ids[0] for event in stored] == [0, BLOCK, 2 * BLOCK]
        assert [event.block_size for event in stored] == [BLOCK] * 3
        log.restart()
        assert len(log.take(10)) == 3 and log.take(10) == []
        stored.clear()
        rig.submit("b", 3)
        wait_until(heard, "what the pool has is announced anew when it is found")
        assert set(reader.known.values()) == {"CPU"}
    finally:
        rig.close()
