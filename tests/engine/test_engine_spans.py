"""Spans in a live engine: loads and saves that travel together, with a result for each block."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from penstock.core.keys import BlockKey, KeyChain, root_key
from penstock.core.new_block import NewBlock
from penstock.core.operations import Save
from penstock.engine.hf_runner import HFRunner
from penstock.engine.save_spans import SaveSpans
from penstock.engine.transfers import End
from penstock.pool.announced import AnnouncedPool
from penstock.pool.api import DoneMany, Pool, PoolError, ReadCheck
from penstock.pool.authenticated import AuthenticatedPool
from penstock.pool.kv_events import KvEventLog
from penstock.pool.mac import PoolKey
from penstock.pool.net import one_sided_writes
from penstock.pool.net.connect import connect_pool
from penstock.pool.net.nixl_agent import NixlAgent
from penstock.pool.net.node import PoolNode
from penstock.pool.net.remote import RemotePool
from penstock.pool.setup.open import open_local_pool
from penstock.pool.wrapped import WrappedPool
from tests.asking import prompt_of, wait_until
from tests.engine.engine_rig import BLOCK, serving
from tests.pool.net.one_sided_rig import NIXL, counted, counted_writes

BLOCKS = 24
PROMPT = prompt_of(7, BLOCKS * BLOCK + 5)
SPANS: dict[str, Any] = {
    "fetch_window_blocks": 64,
    "l2_slots": 128,
    "upload_group_blocks": 8,
    "save_window_blocks": 16,
}  # of 8 blocks
CLOSE_S = 5.0


class SpanPool(WrappedPool):
    """Passes spans on, and notes their sizes; `spoil(key)` is the reason for which a read of that block ends."""

    def __init__(self, inner: Pool, leases: bool = True) -> None:
        super().__init__(inner)
        self.reads: list[int] = []
        self.writes: list[int] = []
        self.spoil: Callable[[BlockKey], str | None] = lambda key: None
        self.held: queue.SimpleQueue[Callable[[], None]] | None = None
        self.raises = False
        self._leases = leases

    def lease(self, key: BlockKey):  # type: ignore[no-untyped-def]
        return super().lease(key) if self._leases else None

    def read_many(
        self,
        keys: Sequence[BlockKey],
        size_bytes: int,
        intos: Sequence[memoryview],
        timeout_s: float,
        done: DoneMany,
        checks: Sequence[ReadCheck | None] | None = None,
    ) -> None:
        self.reads.append(len(keys))
        if self.raises:
            raise RuntimeError("injected")

        def ended(errors: list[PoolError | None]) -> None:
            reasons = [self.spoil(key) for key in keys]
            done([PoolError(why, "injected") if why else error for why, error in zip(reasons, errors, strict=True)])

        def read() -> None:
            self._inner.read_many(keys, size_bytes, intos, timeout_s, ended, checks)

        if self.held is not None:
            self.held.put(read)
        else:
            read()

    def write_many(
        self, blocks: Sequence[NewBlock], datas: Sequence[memoryview], timeout_s: float, done: DoneMany
    ) -> None:
        self.writes.append(len(blocks))
        self._inner.write_many(blocks, datas, timeout_s, done)

    def close(self, timeout_s: float) -> None:
        """The pool behind is somebody else's to close."""


@contextlib.contextmanager
def served(kind: str, folder: Path) -> Iterator[Pool]:
    """A memory pool of this process; or a node with memory, which may be read one-sided, or with a slab."""
    slabs = [(folder / "kv.slab", 32 << 20)] if kind == "slab node" else []
    with contextlib.ExitStack() as undo:
        local = open_local_pool(() if slabs else (32 << 20,), slabs)
        undo.callback(local.close, CLOSE_S)
        if kind == "memory":
            yield local
            return
        agent = NixlAgent() if kind == "one-sided node" else None
        node = PoolNode(local, "127.0.0.1", 0, staging_capacity_bytes=16 << 20, one_sided=agent)
        undo.callback(node.close, CLOSE_S)
        client = connect_pool(f"127.0.0.1:{node.address[1]}")
        undo.callback(client.close, CLOSE_S)
        yield client


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Pool]:
    with served("node", tmp_path) as pool:
        yield pool


def await_attached(pool: Pool, kind: str) -> None:
    """Wait until blocks travel one-sided, where they can."""
    if kind == "one-sided node":
        assert isinstance(pool, RemotePool)
        wait_until(lambda: not pool.one_sided.startswith("off"), "the node's memory is attached")


def keys_of(runner: HFRunner) -> list[BlockKey]:
    return KeyChain(root_key(runner.layout.fingerprint(runner.model_id), ""), BLOCK).extend(PROMPT)


@pytest.mark.parametrize("wrap", ["plain", "authenticated", "announced"])
@pytest.mark.parametrize("kind", ["memory", "node", "slab node", pytest.param("one-sided node", marks=NIXL)])
def test_spans_give_the_computed_tokens(
    kind: str,
    wrap: str,
    llama: HFRunner,
    computed: Callable[..., list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(one_sided_writes, "SPAN_BYTES_MIN", 0)
    with served(kind, tmp_path) as inner:
        watched = SpanPool(inner)
        pool: Pool = watched
        if wrap == "authenticated":
            pool = AuthenticatedPool(watched, PoolKey(b"k" * 32))
        elif wrap == "announced":
            pool = AnnouncedPool(watched, KvEventLog())
        with counted_writes() as written, serving(llama, pool, **SPANS) as rig:
            await_attached(inner, kind)
            assert rig.ask(PROMPT).tokens == computed(PROMPT)
            rig.settle()
            assert rig.counter("saved_blocks") == BLOCKS
        assert max(watched.writes) > 1, "saves travelled singly"
        with counted() as read, serving(llama, pool, **SPANS) as rig:
            await_attached(inner, kind)
            answer = rig.ask(PROMPT)
            assert answer.tokens == computed(PROMPT)
            assert answer.report.loaded_bytes == BLOCKS * llama.layout.full_block_bytes
            assert not answer.report.load_failures
        assert watched.reads == ([8, 8, 8] if kind != "memory" else [])
        moved = answer.report.loaded_bytes if kind == "one-sided node" else 0
        assert read["one-sided"] == written["one-sided"] == moved


def test_blocks_of_a_span_fail_alone(llama: HFRunner, computed: Callable[..., list[int]], remote: Pool) -> None:
    with serving(llama, remote, **SPANS) as rig:
        rig.ask(PROMPT)
    keys = keys_of(llama)
    assert remote.evict([keys[9]]) == 1
    pool = SpanPool(remote)
    why = {keys[2]: "checksum", keys[20]: "device", keys[21]: "network"}
    pool.spoil = why.get
    with serving(llama, pool, **SPANS) as rig:
        looked_up = rig.ask(PROMPT)
        assert looked_up.tokens == computed(PROMPT)
        assert looked_up.report.load_failures == {"checksum": 1, "device": 1, "network": 1}
        assert looked_up.report.loaded_bytes == (BLOCKS - 4) * llama.layout.full_block_bytes
        rig.settle()


@pytest.mark.parametrize("leases", [True, False])
def test_a_span_whose_blocks_cannot_all_be_leased_is_read(
    leases: bool, llama: HFRunner, computed: Callable[..., list[int]], memory_pool: Pool
) -> None:
    with serving(llama, memory_pool, **SPANS) as rig:
        rig.ask(PROMPT)
    pool = SpanPool(memory_pool, leases)
    keys = keys_of(llama)
    looked_up = pool.lookup

    def then_evict(asked: Sequence[BlockKey], timeout_s: float):  # type: ignore[no-untyped-def]
        found = looked_up(asked, timeout_s)
        memory_pool.evict([keys[12]])
        return found

    pool.lookup = then_evict  # type: ignore[method-assign,assignment]
    with serving(llama, pool, **SPANS) as rig:
        answer = rig.ask(PROMPT)
        assert answer.tokens == computed(PROMPT) and answer.report.load_failures == {"missing": 1}
        rig.settle()
    assert pool.reads == ([8] if leases else [8, 8, 8])
    assert memory_pool.evict(keys) == BLOCKS, "a lease was not given back"


def test_a_pool_that_raises_for_a_span_costs_its_blocks_only(
    llama: HFRunner, computed: Callable[..., list[int]], remote: Pool
) -> None:
    with serving(llama, remote, **SPANS) as rig:
        rig.ask(PROMPT)
    pool = SpanPool(remote)
    pool.raises = True
    with serving(llama, pool, **SPANS) as rig:
        answer = rig.ask(PROMPT)
        assert answer.tokens == computed(PROMPT) and answer.report.load_failures == {"device": BLOCKS}
        rig.settle()


def test_a_span_that_never_ends_is_given_up_and_lands_nowhere(
    llama: HFRunner, computed: Callable[..., list[int]], remote: Pool
) -> None:
    other = prompt_of(8, len(PROMPT))
    with serving(llama, remote, **SPANS) as rig:
        rig.ask(PROMPT)
        rig.ask(other)
    pool = SpanPool(remote)
    pool.held = queue.SimpleQueue()
    with serving(llama, pool, fetch_timeout_s=0.2, **SPANS) as rig:
        answer = rig.ask(PROMPT)
        assert answer.tokens == computed(PROMPT) and answer.report.load_failures == {"deadline": BLOCKS}
        held, pool.held = pool.held, None
        for _ in range(held.qsize()):
            held.get()()
        for prompt in (other, PROMPT, other):
            assert rig.ask(prompt).tokens == computed(prompt)
        rig.settle()


def test_two_requests_that_share_the_blocks_of_a_span_load_them_once(
    llama: HFRunner, computed: Callable[..., list[int]], remote: Pool
) -> None:
    with serving(llama, remote, **SPANS) as rig:
        rig.ask(PROMPT)
    pool = SpanPool(remote)
    pool.held = held = queue.SimpleQueue[Callable[[], None]]()
    longer = [*PROMPT[: BLOCKS * BLOCK], *prompt_of(9, 7)]
    with serving(llama, pool, **SPANS) as rig:
        answers = [rig.start(PROMPT), rig.start(longer)]
        wait_until(lambda: rig.counter("loads_shared") == BLOCKS and held.qsize() == 3, "sharing")
        pool.held = None
        for _ in range(3):
            held.get()()
        assert [one.wait() and one.tokens for one in answers] == [computed(PROMPT), computed(longer)]
        assert sum(pool.reads) == BLOCKS


def _save(number: int, tenant: bytes = b"") -> Save:
    return Save(number, NewBlock(bytes([number]) * 16, bytes(16), 1, tenant=tenant), number, number, 1.0)


def test_saves_wait_for_each_other_but_not_for_long() -> None:
    written: list[list[int]] = []
    spans = SaveSpans(4, lambda saves: written.append([op.op_id for op, _ in saves]))
    end: End = lambda reason: None  # noqa: E731

    for _ in range(9):
        spans.copying()
    for number in range(4):
        spans.copied((_save(number), end))
    assert written == [[0, 1, 2, 3]]  # a full span
    spans.copied((_save(4), end))
    spans.copied((_save(5, b"tenantAA"), end))
    spans.copied((_save(6), end))
    spans.copied(None)
    assert len(written) == 1
    spans.copied(None)  # nothing is being copied any more, whether it went well or not
    assert written[1:] == [[4, 6], [5]]
    spans.copying()
    spans.copied((_save(7), end))
    assert written[3:] == [[7]]
