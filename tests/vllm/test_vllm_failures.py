"""What vLLM's scheduler sees when Penstock, its pool or a worker fails: an answer in time, and all given back."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.core.config import ConfigError
from penstock.core.connector.scheduler import ConnectorOperation
from penstock.core.keys import root_key
from penstock.core.new_block import NewBlock
from penstock.core.operations import RequestSpec
from penstock.pool.api import Done, Pool
from penstock.pool.wrapped import WrappedPool
from penstock.process.loss_log import LossLog
from penstock.vllm import host as host_module
from penstock.vllm.host import Host
from penstock.vllm.losses import LOSSES, PREFIX
from penstock.vllm.settings import Settings
from penstock.vllm.shape import Shape, open_pool_of
from penstock.vllm.worker import WorkerSide
from tests.vllm.gated_rows import ROWS, WAIT_S, GatedRows
from tests.waiting import wait_until

BLOCK = 8
ROOT = root_key(b"0123456789abcdef", "")
SETTINGS = Settings(memory=(16 << 20,), staging_bytes=1 << 20, lookup_timeout_s=10.0)


def in_time(work: Callable[[], object]) -> bool:
    """Whether it returns although nothing else happens meanwhile."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(WAIT_S / 3)
    return not thread.is_alive()


class Engine:
    """Workers and host; requests of one prompt."""

    def __init__(self, ranks: int = 1, settings: Settings = SETTINGS, defers_frees: bool = True) -> None:
        name = str(uuid.uuid4())
        self.rows = [GatedRows() for _ in range(ranks)]
        self.workers = [WorkerSide(name, rank, rows, defers_frees) for rank, rows in enumerate(self.rows)]
        try:
            self.host = Host(settings, Shape(name, ranks, BLOCK, (ROWS,), 100, False, True, True, True))
        except BaseException:
            self._close_workers()
            raise

    def submit(self, name: str, blocks: int) -> None:
        tokens = [*range(blocks * BLOCK), 10_000]
        self.host.submit(RequestSpec(name, tokens, 1, ROOT), 0, True)

    def save(self, name: str, blocks: int) -> None:
        for index in range(blocks):
            self.host.offer(name, index, [[index * ROWS, index * ROWS + 1]], step=1)
        for worker in self.workers:
            worker.steps.record(1)

    def counter(self, name: str) -> int:
        return int(self.host.ask(lambda scheduler: scheduler.counters.get(name, 0)))

    def begin_load(self, name: str, blocks: int) -> None:
        self.submit(name, blocks)
        assert self.matched(name) == blocks * BLOCK
        self.allocated(name, blocks)

    def matched(self, name: str) -> int:
        """The tokens that will be loaded, as they are said first: blocks that fail later are missing from then on."""
        answers: list[int | None] = []
        wait_until(
            lambda: answers.append(self.host.matched(name, 0)) or answers[-1] is not None, "the lookup is answered"
        )
        assert answers[-1] is not None
        return answers[-1]

    def allocated(self, name: str, blocks: int) -> None:
        self.host.allocated(name, 0, [[[20 + 2 * i, 21 + 2 * i]] for i in range(blocks)])

    def _close_workers(self) -> None:
        for rows in self.rows:
            rows.gate.set()
        for worker in self.workers:
            worker.close()

    def close(self) -> None:
        for rows in self.rows:
            rows.gate.set()
        self.host.close()
        self._close_workers()


@contextmanager
def engine(**options: object) -> Iterator[Engine]:
    made = Engine(**options)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.close()


def test_a_save_begins_when_it_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "IDLE_WAIT_S", 10 * WAIT_S)
    with engine() as one:
        one.submit("r", 2)
        wait_until(lambda: one.host.matched("r", 0) is not None, "the lookup is answered, and nothing else happens")
        one.save("r", 2)
        wait_until(lambda: one.counter("saved_blocks") == 2, "both blocks are saved, though nothing else happens")


class SlowWrites(WrappedPool):
    """A pool that takes its time over a block before `write` returns, as a checksum does."""

    def __init__(self, inner: Pool, gate: threading.Event) -> None:
        super().__init__(inner)
        self._gate = gate
        self.begun = threading.Event()

    def write(self, block: NewBlock, data: memoryview, timeout_s: float, done: Done) -> None:
        self.begun.set()
        assert self._gate.wait(WAIT_S)
        super().write(block, data, timeout_s, done)


def test_vllms_scheduler_waits_for_no_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    opened: list[SlowWrites] = []
    real = open_pool_of

    def slow(settings: Settings) -> Pool:
        opened.append(SlowWrites(real(settings), gate))
        return opened[0]

    monkeypatch.setattr(host_module, "open_pool_of", slow)
    with engine() as one:
        one.submit("r", 1)
        one.save("r", 1)
        assert opened[0].begun.wait(WAIT_S)
        assert in_time(lambda: one.host.can_keep) and in_time(lambda: one.submit("other", 3))
        wait_until(lambda: one.host.matched("other", 0) is not None, "lookups go on beside it")
        gate.set()
        wait_until(lambda: one.counter("saved_blocks") == 1, "the block is saved")


def test_vllms_scheduler_waits_for_a_decision_only_so_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(host_module, "LOCK_TIMEOUT_S", 0.2)
    entered, leave = threading.Event(), threading.Event()
    with engine() as one:
        one.submit("r", 1)

        def stuck(now: float) -> list[ConnectorOperation]:
            entered.set()
            leave.wait(WAIT_S)
            return []

        monkeypatch.setattr(one.host.scheduler, "decide", stuck)
        one.host.wake()
        assert entered.wait(WAIT_S)
        calls: list[Callable[[], object]] = [
            lambda: one.host.matched("r", 0),
            lambda: one.host.allocated("r", 0, [[[30, 31]]]),
            lambda: one.host.offer("r", 0, [[0, 1]], 1),
            lambda: one.host.finish("r"),
        ]
        assert all(in_time(call) for call in calls)
        leave.set()
        wait_until(lambda: one.host.fatal is not None, "Penstock gives up")
        assert "held the lock" in str(one.host.fatal)
        told = []
        wait_until(lambda: bool(told.extend(one.workers[0].take_finished()) or told), "the load is over")
        assert told[0].invalid == [30, 31] and len(one.host.released()) == 1
    assert "vLLM goes on without it" in caplog.text


@pytest.mark.parametrize("call", ["extend", "offer", "matched", "allocated", "started", "finish", "stepped", "press"])
def test_a_defect_on_vllms_thread_does_not_end_vllm(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine() as one:
        one.submit("r", 1)

        def broken(*given: object) -> None:
            raise KeyError("a defect")

        monkeypatch.setattr(one.host.scheduler, call if call != "extend" else "known_tokens", broken)
        arguments: dict[str, tuple[object, ...]] = {
            "extend": ("r", [1, 2, 3]),
            "offer": ("r", 0, [[0, 1]], 1),
            "matched": ("r", 0),
            "allocated": ("r", 0, [[[30, 31]]]),
            "stepped": ([(1, 1)], 1.0),
            "press": (3,),
        }
        getattr(one.host, call)(*arguments.get(call, ("r",)))
        wait_until(lambda: one.host.fatal is not None, "Penstock gives up")
        assert one.host.matched("r", 0) == 0 and one.host.can_keep is False
        if call == "allocated":
            told = []
            wait_until(lambda: bool(told.extend(one.workers[0].take_finished()) or told), "the load is over")
        assert len(one.host.released()) == (call == "offer")


def test_a_load_ends_when_one_workers_link_is_gone_and_the_others_have_ended(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not before, and each worker hears it once: over its link, or with a step of vLLM's where that is gone."""
    with engine(ranks=2) as one:
        one.submit("first", 2)
        one.save("first", 2)
        wait_until(lambda: one.counter("saved_blocks") == 2, "blocks are saved")
        gone, slow = one.workers
        one.rows[1].gate.clear()
        while one.rows[1].begun.acquire(blocking=False):
            pass
        one.begin_load("second", 2)
        assert one.rows[1].begun.acquire(timeout=WAIT_S)
        gone.close()
        wait_until(lambda: one.host.fatal is not None, "the host sees it")
        assert not slow.take_finished() and not one.host.notices(), "rank 1 still writes to the pages"
        one.rows[1].gate.set()
        wait_until(lambda: bool(one.host.notices()), "the load is over")
        for worker in (gone, slow):
            for _ in range(3):
                worker.hear(one.host.notices())
        told = []
        wait_until(lambda: bool(told.extend(slow.take_finished()) or told), "rank 1 was told")
        assert told == gone.take_finished() and len(told) == 1, "both ranks, once each"
        assert told[0].request_id == "second" and told[0].invalid == [20, 21, 22, 23]
        one.host.acknowledged("second")
        assert not one.host.notices()


def test_where_vllm_reuses_blocks_that_a_step_may_write_the_start_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"kv_role 'kv_producer'.*allowed: kv_role 'kv_both'"):
        Engine(defers_frees=False)


def test_a_load_waits_for_the_step_that_may_zero_its_blocks() -> None:
    with engine() as one:
        one.submit("first", 1)
        one.save("first", 1)
        wait_until(lambda: one.counter("saved_blocks") == 1, "the block is saved")
        one.submit("second", 1)
        one.matched("second")
        while one.rows[0].begun.acquire(blocking=False):
            pass
        one.host.allocated("second", 0, [[[20, 21]]], after_step=7)
        wait_until(
            lambda: one.host.ask(lambda scheduler: scheduler.gauges()["l2_slots_loads"]) == 1, "the block is staged"
        )
        one.workers[0].steps.begin(6, zeroes=True)
        assert not one.rows[0].begun.acquire(timeout=0.3), "step 7 may still put zeros there"
        one.workers[0].steps.begin(7, zeroes=True)
        assert one.rows[0].begun.acquire(timeout=WAIT_S)


def test_a_block_of_a_step_that_failed_is_not_saved() -> None:
    with engine() as one:
        one.submit("r", 2)
        page, _ = one.host.offer("r", 0, [[0, 1]], step=1)
        one.workers[0].steps.fail(1)
        kept = {page}
        wait_until(lambda: bool(kept.difference_update(one.host.released()) or not kept), "vLLM has its blocks back")
        wait_until(lambda: one.counter("saves_failed") == 1, "it is counted")
        assert one.counter("saved_blocks") == 0 and one.host.wants("r", 0), "it may be saved later"


def test_every_loss_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    losses = LossLog(logging.getLogger("penstock.test"), LOSSES, PREFIX)
    for count in (1, 1, 2, 3):
        losses.look(dict.fromkeys(LOSSES, count))
    assert [record.getMessage() for record in caplog.records] == [f"Penstock: 1 {text}" for text in LOSSES.values()]


def test_a_wake_is_queued_once() -> None:
    """Events come from vLLM's thread faster than a stuck control thread takes them."""
    with engine() as one:
        entered, leave = threading.Event(), threading.Event()

        def stuck(question: object) -> None:
            entered.set()
            leave.wait(WAIT_S)

        threading.Thread(target=lambda: one.host.ask(stuck), daemon=True).start()
        assert entered.wait(WAIT_S)
        for _ in range(1000):
            one.host.wake()
        assert one.host.queued_events <= 2
        leave.set()


def test_with_a_pool_key_no_other_block_is_loaded(tmp_path: Path) -> None:
    """Saved under one key: hits for the same key are loaded, those that were written without are computed."""
    path = tmp_path / "pool.key"
    path.touch(0o600)
    path.write_text("k" * 32)
    slab = ((tmp_path / "kv.slab", 8 << 20),)
    ours = replace(SETTINGS, memory=(), slab=slab, pool_key_file=path)
    for first, then, failures in ((ours, ours, set()), (replace(ours, pool_key_file=None), ours, {"mac"})):
        (tmp_path / "kv.slab").unlink(missing_ok=True)
        (tmp_path / "kv.slab.db").unlink(missing_ok=True)
        with engine(settings=first) as one:
            one.submit("r", 2)
            one.matched("r")
            one.save("r", 2)
            wait_until(lambda one=one: one.counter("saved_blocks") == 2, "both blocks are saved")  # type: ignore[misc]
        with engine(settings=then) as other:
            other.submit("r", 2)
            tokens = other.matched("r")
            assert tokens == 2 * BLOCK or failures, "only what is refused may be missing"
            if tokens:
                other.allocated("r", tokens // BLOCK)
            found = other.host.activity
            wait_until(lambda found=found: found.uploaded_bytes > 0 or found.load_failures.total() > 0, "its end")  # type: ignore[misc]
            assert set(found.load_failures) == failures
