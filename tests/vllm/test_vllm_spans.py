"""Inside vLLM, too, blocks of one request travel together: reads and writes of the pool, counted, and a reset between
them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from penstock.pool.api import Pool
from penstock.vllm import host as host_module
from penstock.vllm.link import Finished
from penstock.vllm.settings import Settings
from penstock.vllm.shape import open_pool_of
from tests.pool.span_pool import SpanPool
from tests.vllm.test_vllm_sides import BLOCK, Rig
from tests.waiting import wait_until

BLOCKS = 10


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[SpanPool]:
    """The pool of each rig."""
    opened: list[SpanPool] = []

    def noted(settings: Settings) -> Pool:
        opened.append(SpanPool(open_pool_of(settings)))
        return opened[-1]

    monkeypatch.setattr(host_module, "open_pool_of", noted)
    return opened


@pytest.fixture
def rig(pools: list[SpanPool]) -> Iterator[Rig]:
    made = Rig(Settings(memory=(16 << 20,), staging_bytes=4 << 20, lookup_timeout_s=10.0))
    yield made
    made.close()


def test_blocks_are_written_and_read_in_spans(rig: Rig, pools: list[SpanPool]) -> None:
    (pool,) = pools
    assert rig.host.scheduler.config.fetch_window_blocks > 8 * BLOCKS
    for place in range(2 * BLOCKS):
        rig.fill(place, place)
    rig.submit("first", BLOCKS)
    for index in range(BLOCKS):
        rig.host.offer("first", index, [[2 * index, 2 * index + 1]], step=1)
    rig.host.wake()
    wait_until(
        lambda: rig.host.ask(lambda scheduler: scheduler.gauges()["l2_slots_saves"]) == BLOCKS,
        "all wait for their step",
    )
    rig.workers[0].steps.record(1)
    wait_until(lambda: rig.saved() == BLOCKS, "blocks are saved")
    assert pool.writes == [BLOCKS], "blocks were written singly"
    rig.host.finish("first")
    rig.submit("second", BLOCKS)
    wait_until(lambda: rig.host.matched("second", 0) is not None, "the lookup is answered")
    assert rig.host.matched("second", 0) == BLOCKS * BLOCK
    rig.host.allocated("second", 0, [[[20 + 2 * i, 21 + 2 * i]] for i in range(BLOCKS)])
    assert rig.landed("second") == Finished("second", [], False)
    assert pool.reads == [BLOCKS], "blocks were read singly"


def test_a_copied_block_that_waits_for_others_is_not_written_after_a_reset(rig: Rig, pools: list[SpanPool]) -> None:
    (pool,) = pools
    rig.submit("first", 2)
    rig.host.offer("first", 0, [[0, 1]], step=1)
    rig.host.offer("first", 1, [[2, 3]], step=2)
    rig.host.wake()
    (worker,) = rig.workers
    worker.steps.record(1)
    wait_until(lambda: bool(rig.host.released()), "the first block is copied, and waits for the second")
    rig.host.forget_all()
    worker.steps.record(2)
    wait_until(lambda: rig.host.activity.save_failures["reset"] == 2, "neither is written")
    assert not pool.writes and rig.saved() == 0
