"""The connector's two sides with real bytes, real pools and real sockets; tensors stand for the cache of vLLM."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from penstock.core.config import ConfigError
from penstock.core.connector.scheduler import ConnectorOperation
from penstock.core.keys import root_key
from penstock.core.operations import RequestSpec
from penstock.pool.kv_events import KvEventLog
from penstock.pool.net.node import PoolNode
from penstock.pool.setup.open import open_local_pool
from penstock.units import format_address
from penstock.vllm.host import Host
from penstock.vllm.layout import KVRows, Layer
from penstock.vllm.link import Finished, LinkError, connect, listen
from penstock.vllm.settings import Settings, choose_block_tokens, read_settings
from penstock.vllm.shape import Shape
from penstock.vllm.worker import WorkerSide
from tests.waiting import wait_until

BLOCK, VLLM_BLOCK, VLLM_BLOCKS, ROW_BYTES = 8, 4, 40, 96
FINGERPRINT = b"0123456789abcdef"
WAIT_S = 20.0


class Rig:
    """One engine: its workers' caches, the worker side of each, and the scheduler's side."""

    def __init__(self, settings: Settings, ranks: int = 1, groups: int = 1, events: KvEventLog | None = None) -> None:
        engine = str(uuid.uuid4())
        self.caches = [
            [[torch.zeros(VLLM_BLOCKS, ROW_BYTES, dtype=torch.uint8) for _ in range(2)] for _ in range(groups)]
            for _ in range(ranks)
        ]
        self.workers = [
            WorkerSide(
                engine,
                rank,
                KVRows([[Layer(f"l{g}.{i}", rows) for i, rows in enumerate(group)] for g, group in enumerate(cache)]),
            )
            for rank, cache in enumerate(self.caches)
        ]
        shape = Shape(engine, ranks, BLOCK, (BLOCK // VLLM_BLOCK,) * groups, 100, False, True, True)
        self.host = Host(settings, shape, events)
        self.groups = groups
        self.finished: list[Finished] = []

    def fill(self, place: int, seed: int) -> None:
        """What vLLM would compute into a block of every layer and worker."""
        for rank, cache in enumerate(self.caches):
            for group in cache:
                for layer, rows in enumerate(group):
                    rows[place] = torch.arange(ROW_BYTES, dtype=torch.uint8) + seed * 31 + layer * 7 + rank * 3

    def block(self, place: int) -> list[torch.Tensor]:
        return [rows[place].clone() for cache in self.caches for group in cache for rows in group]

    def submit(self, name: str, blocks: int) -> None:
        tokens = [*range(blocks * BLOCK), 10_000]
        self.host.submit(RequestSpec(name, tokens, 1, root_key(FINGERPRINT, "")), 0, True)

    def save(self, name: str, blocks: int) -> None:
        """Save blocks 0.. of a request from vLLM blocks 0.. of the cache."""
        rows = BLOCK // VLLM_BLOCK
        for index in range(blocks):
            ids = [[index * rows + at for at in range(rows)]] * self.groups
            self.host.offer(name, index, ids, step=1)
        self.host.wake()
        for worker in self.workers:
            worker.steps.record(1)
        wait_until(lambda: self.saved() >= blocks, "blocks are saved")

    def saved(self) -> int:
        return int(self.host.ask(lambda scheduler: scheduler.counters.get("saved_blocks", 0)))

    def landed(self, name: str) -> Finished:
        """What every worker was told about a load."""
        told: list[Finished] = []

        def all_told() -> bool:
            for worker in self.workers:
                told.extend(worker.take_finished())
            return len(told) == len(self.workers)

        wait_until(all_told, f"the load of {name} is over")
        assert {one.request_id for one in told} == {name}
        return told[0]

    def close(self) -> None:
        self.host.close()
        for worker in self.workers:
            worker.close()


@pytest.fixture
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    ranks, groups = getattr(request, "param", (1, 1))
    made = Rig(Settings(memory=(16 << 20,), staging_bytes=1 << 20, lookup_timeout_s=10.0), ranks, groups)
    yield made
    made.close()


@pytest.mark.parametrize("rig", [(1, 1), (2, 1), (1, 2)], indirect=True)
def test_saved_blocks_come_back_into_other_pages_of_every_worker(rig: Rig) -> None:
    for place in range(6):
        rig.fill(place, place)
    rig.submit("first", 3)
    rig.save("first", 3)
    before = [rig.block(place) for place in range(6)]
    rig.host.finish("first")
    rig.submit("second", 3)
    wait_until(lambda: rig.host.matched("second", 0) is not None, "the lookup is answered")
    assert rig.host.matched("second", 0) == 3 * BLOCK
    rig.host.allocated("second", 0, [[[20 + 2 * i, 21 + 2 * i]] * rig.groups for i in range(3)])
    assert rig.landed("second") == Finished("second", [], False)
    for place in range(6):
        assert all(torch.equal(a, b) for a, b in zip(before[place], rig.block(20 + place), strict=True))


def test_a_scheduler_that_has_nothing_else_to_do_waits_for_news_of_its_loads(rig: Rig) -> None:
    rig.submit("first", 3)
    rig.save("first", 3)
    rig.host.finish("first")
    wait_until(lambda: not rig.host.queued_events, "nothing is left to happen")
    for _ in range(5):
        rig.host.wait_for_news(0.1)  # what happened before
    returned = threading.Event()

    def wait() -> None:
        rig.host.wait_for_news(1e6)
        returned.set()

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    assert not returned.wait(0.5), "it does not wait"
    rig.submit("second", 3)
    assert returned.wait(WAIT_S)
    wait_until(lambda: rig.host.matched("second", 0) is not None, "the lookup is answered")
    rig.host.allocated("second", 0, [[[20 + 2 * i, 21 + 2 * i]] for i in range(3)])
    rig.landed("second")
    for _ in range(2):
        rig.host.wait_for_news(1e6)  # until vLLM has heard of the end, no wait
    rig.host.acknowledged("second")


def test_blocks_that_vllm_holds_are_not_written(rig: Rig) -> None:
    for place in range(4):
        rig.fill(place, place)
    rig.submit("first", 2)
    rig.save("first", 2)
    rig.host.finish("first")
    rig.submit("second", 2)
    wait_until(lambda: rig.host.matched("second", VLLM_BLOCK) is not None, "the lookup is answered")
    assert rig.host.matched("second", VLLM_BLOCK) == 2 * BLOCK - VLLM_BLOCK
    rig.host.allocated("second", 0, [[[-1, 21]], [[22, 23]]])
    rig.landed("second")
    assert not any(bool(rows.any()) for rows in rig.block(20)), "the block that vLLM holds was written"
    assert all(torch.equal(a, b) for a, b in zip(rig.block(1), rig.block(21), strict=True))


def test_pages_are_kept_until_their_step_was_computed_and_copied(rig: Rig) -> None:
    rig.fill(0, 1)
    rig.submit("r", 1)
    page, _ = rig.host.offer("r", 0, [[0, 1]], step=5)
    rig.host.wake()
    rig.workers[0].steps.record(4)
    time.sleep(0.05)
    assert rig.host.released() == [], "step 5 has not been computed"
    rig.workers[0].steps.record(5)
    kept = {page}

    def given_back() -> bool:
        kept.difference_update(rig.host.released())
        return not kept

    wait_until(given_back, "the page is given back")
    wait_until(lambda: rig.saved() == 1, "the block is saved")


def test_a_copy_under_way_when_all_is_forgotten_is_not_written(rig: Rig) -> None:
    """Its step may have been computed with the weights before, or with those after."""
    rig.submit("r", 2)
    pages = {rig.host.offer("r", index, [[2 * index, 2 * index + 1]], step=5)[0] for index in range(2)}
    rig.host.wake()
    wait_until(
        lambda: not rig.host.ask(lambda scheduler: scheduler.gauges()["saves_queued"]) - 2, "both wait for their step"
    )
    rig.host.forget_all()
    rig.workers[0].steps.record(5)

    def given_back() -> bool:
        pages.difference_update(rig.host.released())
        return not pages

    wait_until(given_back, "vLLM has its blocks back")
    wait_until(lambda: rig.host.ask(lambda scheduler: scheduler.idle), "nothing is left")
    rig.submit("r", 2)
    wait_until(lambda: rig.host.matched("r", 0) is not None, "the lookup is answered")
    assert rig.host.matched("r", 0) == 0 and rig.saved() == 0, "the pool got a block whose weights nobody knows"


def test_a_load_under_way_when_all_is_forgotten_is_not_believed() -> None:
    with pool_node(pace_bytes_per_s=500) as node:
        options = {"staging_bytes": 1 << 20, "lookup_timeout_s": 10.0, "fetch_timeout_s": 60.0}
        rig = Rig(Settings(pool=(format_address(*node.address),), **options))  # type: ignore[arg-type]
        try:
            rig.submit("first", 4)
            rig.save("first", 4)
            rig.host.finish("first")
            rig.submit("second", 4)
            wait_until(lambda: rig.host.matched("second", 0) is not None, "the lookup is answered")
            rig.host.allocated("second", 0, [[[20 + 2 * i, 21 + 2 * i]] for i in range(4)])
            rig.host.forget_all()
            assert rig.landed("second").invalid == list(range(20, 28))
        finally:
            rig.close()


@contextlib.contextmanager
def pool_node(pace_bytes_per_s: float | None = None) -> Iterator[PoolNode]:
    """A pool node on a port of its own, in this process."""
    pool = open_local_pool([16 << 20], [])
    node = PoolNode(pool, "127.0.0.1", 0, pace_bytes_per_s=pace_bytes_per_s)
    try:
        yield node
    finally:
        node.close(1.0)
        pool.close(1.0)


def test_blocks_that_are_lost_after_pages_were_given_are_named_to_vllm() -> None:
    with pool_node(pace_bytes_per_s=500) as node:  # a block has 384 bytes
        options = {"staging_bytes": 1 << 20, "lookup_timeout_s": 10.0, "fetch_timeout_s": 60.0}
        rig = Rig(Settings(pool=(format_address(*node.address),), fetch_window_bytes=384, **options))  # type: ignore[arg-type]
        try:
            for place in range(12):
                rig.fill(place, place)
            rig.submit("first", 6)
            rig.save("first", 6)
            rig.host.finish("first")
            rig.submit("second", 6)
            wait_until(lambda: rig.host.matched("second", 0) is not None, "the lookup is answered")
            assert rig.host.matched("second", 0) == 6 * BLOCK
            pages = [[20 + 2 * i, 21 + 2 * i] for i in range(6)]
            rig.host.allocated("second", 0, [[one] for one in pages])
            node.close(1.0)
            told = rig.landed("second")
            flat = [place for one in pages for place in one]
            assert told.invalid and flat[-len(told.invalid) :] == told.invalid, "from the first lost block on"
            for place in range(len(flat) - len(told.invalid)):
                assert all(torch.equal(a, b) for a, b in zip(rig.block(place), rig.block(20 + place), strict=True))
            rig.host.acknowledged("second")
            wait_until(lambda: rig.host.matched("second", 0) is not None, "the lookup fails")
            assert rig.host.matched("second", 0) == 0, "without its pool a request is computed"
        finally:
            rig.close()


def test_the_end_of_a_cancelled_load_is_told_once_its_pages_are_safe() -> None:
    with pool_node(pace_bytes_per_s=500) as node:
        options = {"staging_bytes": 1 << 20, "lookup_timeout_s": 10.0, "fetch_timeout_s": 60.0}
        rig = Rig(Settings(pool=(format_address(*node.address),), **options))  # type: ignore[arg-type]
        try:
            rig.submit("first", 4)
            rig.save("first", 4)
            rig.host.finish("first")
            rig.submit("second", 4)
            wait_until(lambda: rig.host.matched("second", 0) is not None, "the lookup is answered")
            rig.host.allocated("second", 0, [[[20 + 2 * i, 21 + 2 * i]] for i in range(4)])
            rig.host.finish("second")
            rig.landed("second")
            rig.host.acknowledged("second")
            rig.host.ask(lambda scheduler: scheduler.check_integrity())
        finally:
            rig.close()


def test_when_penstock_fails_inside_vllm_gets_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load under way counts as failed, blocks kept for saves come back, and vllm goes on by itself."""
    with pool_node(pace_bytes_per_s=500) as node:
        options = {"staging_bytes": 1 << 20, "lookup_timeout_s": 10.0, "fetch_timeout_s": 60.0}
        rig = Rig(Settings(pool=(format_address(*node.address),), **options))  # type: ignore[arg-type]
        try:
            rig.submit("first", 4)
            rig.save("first", 4)
            rig.host.finish("first")
            rig.submit("loads", 4)
            rig.submit("saves", 5)
            wait_until(lambda: rig.host.matched("loads", 0) is not None, "the lookup is answered")
            rig.host.allocated("loads", 0, [[[20 + 2 * i, 21 + 2 * i]] for i in range(4)])
            kept, _ = rig.host.offer("saves", 4, [[8, 9]], step=2)  # a step that is never computed
            rig.host.released()

            def broken(now: float) -> list[ConnectorOperation]:
                raise RuntimeError("a defect")

            monkeypatch.setattr(rig.host.scheduler, "decide", broken)
            rig.host.wake()
            told = rig.landed("loads")
            assert told.invalid == list(range(20, 28)), "no block of the load is believed"
            assert rig.host.fatal is not None and "a defect" in rig.host.fatal
            assert rig.host.released() == [kept] and rig.host.released() == []
            rig.host.acknowledged("loads")
            assert rig.host.matched("loads", 0) == 0
            rig.host.allocated("saves", 0, [[[30, 31]]])
            assert rig.landed("saves").invalid == [30, 31]
            for event in (rig.host.started, rig.host.prefilled, rig.host.finish):
                event("loads")
            rig.submit("later", 2)
            assert rig.host.matched("later", 0) == 0
        finally:
            rig.close()


def test_a_block_that_the_pool_holds_is_not_wanted_again(rig: Rig) -> None:
    rig.submit("first", 3)
    rig.save("first", 3)
    rig.host.finish("first")
    tokens = [*range(3 * BLOCK), 10_000]
    rig.host.submit(RequestSpec("held", tokens, 1, root_key(FINGERPRINT, "")), 3 * BLOCK, True)  # vLLM holds all of it
    assert not any(rig.host.wants("held", index) for index in range(3)) and rig.host.can_keep


def test_a_worker_that_is_not_on_this_host_is_a_clear_error() -> None:
    with pytest.raises(LinkError, match="rank 3 of engine nowhere does not answer on this host"):
        connect("nowhere", 3, timeout_s=0.1)


def test_two_workers_cannot_have_one_place() -> None:
    with listen("twice", 0), pytest.raises(LinkError, match="cannot listen"):
        listen("twice", 0)


def test_no_thread_or_memory_is_left_behind() -> None:
    before = {thread.name for thread in threading.enumerate()}
    files = set(Path("/dev/shm").iterdir())
    rig = Rig(Settings(memory=(1 << 20,), staging_bytes=1 << 20))
    named = {path for path in set(Path("/dev/shm").iterdir()) - files if "staging" in path.name}
    assert not named, "the staging memory has a name that could be left behind"
    rig.close()
    wait_until(
        lambda: not {t.name for t in threading.enumerate() if t.name.startswith("penstock")} - before,
        "all threads end",
    )


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({}, "no pool is named"),
        ({"pol": "x"}, "has the key 'pol'; allowed: .*pool_config"),
        ({"pool": "here"}, "pool is 'here'"),
        ({"memory": "1GiB", "policy": "best"}, "policy is 'best'; allowed: fcfs"),
        ({"memory": "lots"}, "memory is 'lots'"),
        ({"memory": "1GiB", "pool_config": "a.toml"}, "pool_config is set together with"),
        ({"memory": "1GiB", "fetch_timeout_s": -1}, "fetch_timeout_s is -1"),
        ({"memory": "1GiB", "fetch_timeout_s": "fast"}, "fetch_timeout_s is 'fast'; allowed: a number"),
        ({"memory": "1GiB", "load_always": "yes"}, "load_always is 'yes'; allowed: true or false"),
        (
            {"memory": "1GiB", "fetch_window_blocks": 8},
            r"window_blocks'; allowed: fetch_window \(SIZE\) in its place",
        ),
        ({"memory": "1GiB", "fetch_window": "wide"}, "fetch_window is 'wide'; size 'wide' is not understood"),
        ({"slab": "/data/kv.slab"}, "slab is '/data/kv.slab'; allowed: PATH:SIZE"),
    ],
)
def test_a_wrong_setting_is_one_line_that_says_what_is_allowed(extra: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as raised:
        read_settings(extra)
    assert "\n" not in str(raised.value)


def test_settings_are_read() -> None:
    settings = read_settings(
        {"pool": "a:1, b:2", "slab": "/x:1GiB", "staging": "64MiB", "policy": "lstf", "default_slo_ttft_s": 2}
    )
    assert settings.pool == ("a:1", "b:2") and settings.slab == ((Path("/x"), 1 << 30),)
    assert settings.staging_bytes == 64 << 20 and settings.policy == "lstf" and settings.default_slo_ttft_s == 2.0


def test_the_pools_block_is_a_multiple_of_vllms() -> None:
    assert [choose_block_tokens(0, unit) for unit in (16, 32, 64, 128, 48)] == [64, 64, 64, 128, 96]
    assert choose_block_tokens(256, 32) == 256
    with pytest.raises(ConfigError, match="block_tokens is 100; allowed: a multiple of vLLM's block size, 32"):
        choose_block_tokens(100, 32)
