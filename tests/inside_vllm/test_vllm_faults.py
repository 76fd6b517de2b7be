"""Lost, late and corrupt blocks, a node that dies, little KV memory, many requests: the output stays the same."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.core.keys import BlockKey
from penstock.pool.api import Done, PoolError
from penstock.pool.members.header import HEADER_BYTES
from penstock.pool.net.node import PoolNode
from penstock.pool.setup.open import open_local_pool
from tests.inside_vllm.vllm_rig import BLOCK, VLLM_BLOCK, PoolProcess, prompt_of, running, wait_until

PROMPTS = [prompt_of(seed, BLOCK * 8 + 9) for seed in range(20, 23)]
LOADABLE = 3 * 8 * BLOCK


class DamagedBlock:
    """A block as a broken node has it: other bytes under the same checksum, or bytes that come too late."""

    def __init__(self, inner: Any, fault: str, released: threading.Event) -> None:
        self._inner, self._fault, self._released = inner, fault, released
        self.key, self.checksum, self.mac, self.remote = inner.key, inner.checksum, inner.mac, inner.remote

    @property
    def view(self) -> memoryview | None:
        if self._fault == "late":
            return None
        data = bytearray(self._inner.view)
        data[len(data) // 2] ^= 1
        return memoryview(data)

    def load(self, into: memoryview, timeout_s: float, done: Done) -> None:
        def later() -> None:
            self._released.wait(timeout_s)
            done(PoolError("deadline", "the device did not answer"))

        threading.Thread(target=later, daemon=True).start()

    def note_read(self) -> None:
        self._inner.note_read()

    def release(self) -> None:
        self._inner.release()


class FaultyPool:
    """What a node serves: a pool whose reads go wrong while `fault` says so, every `every`th of them."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.fault, self.every, self.reads, self.faults = "", 2, 0, 0
        self.released = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def open_block(self, key: BlockKey, size_bytes: int) -> Any:
        opened = self._inner.open_block(key, size_bytes)
        self.reads += 1
        if not self.fault or self.reads % self.every or isinstance(opened, PoolError):
            return opened
        self.faults += 1
        if self.fault == "lost":
            opened.release()
            return PoolError("missing", "evicted a moment ago")
        return DamagedBlock(opened, self.fault, self.released)

    def open_blocks(self, keys: Sequence[BlockKey], size_bytes: int) -> list[Any]:
        return [self.open_block(key, size_bytes) for key in keys]

    def suspect(self, key: BlockKey, checksum: int, mac: bytes, refused: bool) -> None:
        """Damage is on the way, not in the pool."""


@pytest.fixture(scope="module")
def faulty() -> Iterator[tuple[FaultyPool, str]]:
    """A real node over TCP, and its address."""
    pool = FaultyPool(open_local_pool((64 << 20,), ()))
    node = PoolNode(pool, "127.0.0.1", 0)
    yield pool, f"127.0.0.1:{node.address[1]}"
    pool.released.set()
    node.close(5.0)
    pool.close(5.0)


@pytest.mark.parametrize("architecture", ["llama", "sliding"])
def test_lost_late_and_corrupt_blocks_are_computed(
    architecture: str,
    model: Callable[[str], Path],
    computed: Callable[..., list[list[int]]],
    faulty: tuple[FaultyPool, str],
) -> None:
    pool, address = faulty
    expected = computed(architecture, PROMPTS)
    extra = {"pool": address, "fetch_timeout_s": 1.0}
    with running(model(architecture), extra) as engine:
        assert engine.ask(PROMPTS) == expected
        assert engine.again(PROMPTS, LOADABLE) == expected
        for every in (2, 1):
            for fault in ("lost", "corrupt", "late"):
                pool.fault, pool.every, pool.faults = fault, every, 0
                assert engine.again(PROMPTS, 0) == expected, fault
                assert pool.faults > 0, fault
                pool.fault = ""
        assert engine.again(PROMPTS, LOADABLE) == expected


@pytest.mark.parametrize("architecture", ["llama", "sliding"])
def test_vllm_that_gives_other_blocks_than_it_was_offered_computes_those_requests(
    architecture: str,
    model: Callable[[str], Path],
    computed: Callable[..., list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And a defect of Penstock's in one request ends neither vLLM nor the loads of others."""
    from penstock.vllm import compat

    expected, is_storable = computed(architecture, PROMPTS), compat.is_storable
    with running(model(architecture), {"memory": ["64MiB"]}) as engine:
        assert engine.ask(PROMPTS) == expected
        connector = engine.connector
        offer, counts = connector.get_num_new_matched_tokens, connector.side.host.activity.counts
        less = [0]

        def shorter(request: Any, held: int) -> tuple[int | None, bool]:
            found, is_async = offer(request, held)
            return (found - less[0], is_async) if found else (found, is_async)

        monkeypatch.setattr(connector, "get_num_new_matched_tokens", shorter)
        for less[0], refused in ((VLLM_BLOCK, len(PROMPTS)), (BLOCK, 0)):
            before = counts["loads_refused"]
            assert engine.again(PROMPTS, LOADABLE - len(PROMPTS) * BLOCK) == expected
            assert counts["loads_refused"] - before == refused
        less[0] = 0
        give = connector.update_state_after_alloc
        monkeypatch.setattr(
            connector,
            "update_state_after_alloc",
            lambda request, given, tokens: give(
                request, SimpleNamespace(blocks=tuple(group[:3] for group in given.blocks)), tokens
            ),
        )
        assert engine.again(PROMPTS, 0) == expected and counts["loads_refused"] == 2 * len(PROMPTS)
        monkeypatch.setattr(connector, "update_state_after_alloc", give)

        def defect(request: Any) -> Any:
            if list(request.prompt_token_ids) == PROMPTS[0]:
                raise RuntimeError("a defect")
            return is_storable(request)

        monkeypatch.setattr(compat, "is_storable", defect)
        assert engine.again(PROMPTS, LOADABLE * 2 // 3) == expected
        assert counts["requests_not_followed"] == 1 and connector.side.host.fatal is None


def test_flipped_bits_on_a_slab_are_computed(
    llama: Path, computed: Callable[..., list[list[int]]], pool_process: Callable[..., PoolProcess], tmp_path: Path
) -> None:
    path = tmp_path / "kv.slab"
    expected = computed("llama", PROMPTS)
    pool = pool_process("--slab", f"{path}:64MiB")
    with running(llama, {"pool": pool.address}) as engine:
        engine.ask(PROMPTS)
        pool.wait_for_blocks(LOADABLE // BLOCK)
        assert engine.again(PROMPTS, LOADABLE) == expected
    pool.stop()
    content = bytearray(path.read_bytes())
    for at in range(HEADER_BYTES + 1234, len(content), 300_000):  # one bit in about every second block
        content[at] ^= 0x10
    path.write_bytes(content)
    pool.start()
    with running(llama, {"pool": pool.address}) as engine:
        assert engine.again(PROMPTS, 0) == expected
        assert pool.checksum_errors() > 0
        for _ in range(
            4 * (LOADABLE // BLOCK)
        ):  # a bad block is dropped when it is read, and written anew some time later
            found, had = pool.checksum_errors(), engine.counts().external
            assert engine.again(PROMPTS, 0) == expected
            if engine.counts().external - had == LOADABLE and pool.checksum_errors() == found:
                break
        else:
            raise AssertionError("some block never came whole again")
        assert pool.blocks() == LOADABLE // BLOCK
        assert engine.again(PROMPTS, LOADABLE) == expected


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hangs"])
def test_a_pool_node_that_ends_or_hangs_in_the_middle_of_a_load(
    number: signal.Signals,
    llama: Path,
    computed: Callable[..., list[list[int]]],
    pool_process: Callable[..., PoolProcess],
) -> None:
    expected = computed("llama", PROMPTS)
    pool = pool_process("--memory", "64MiB", "--pace", "300KB/s")
    extra = {"pool": pool.address, "fetch_timeout_s": 3.0, "lookup_timeout_s": 1.0, "fetch_window": "1B"}
    with running(llama, extra) as engine:  # one block at a time
        assert engine.ask(PROMPTS) == expected
        pool.wait_for_blocks(LOADABLE // BLOCK)
        engine.forget()
        before = pool.read_bytes()

        def strike() -> None:
            wait_until(lambda: pool.read_bytes() > before, "the first block")
            pool.send(number)

        thread = threading.Thread(target=strike)
        thread.start()
        assert engine.ask(PROMPTS) == expected
        thread.join(60)
        assert engine.again(PROMPTS, 0) == expected
        pool.stop(signal.SIGKILL)


def test_preemption_under_small_kv_memory(llama: Path, computed: Callable[..., list[list[int]]]) -> None:
    """Six requests of 320 tokens where 1,024 fit: vLLM preempts, loads again, and answers the same."""
    prompts = [prompt_of(seed, 200) for seed in range(40, 46)]
    expected = computed("llama", prompts, 120)
    block_bytes = 4 * 2 * 2 * 32 * 4 * 32  # layers, keys and values, heads, width, fp32, tokens
    small = {"kv_cache_memory_bytes": 32 * block_bytes, "max_model_len": 512}
    with running(llama, {"memory": ["64MiB"]}, **small) as engine:
        for _ in range(3):
            assert engine.ask(prompts, 120) == expected
        assert engine.counts().preemptions > 0
        assert engine.again(prompts, BLOCK, new_tokens=120) == expected


def test_two_hundred_requests_at_once(llama: Path, computed: Callable[..., list[list[int]]]) -> None:
    """Ten documents, twenty questions about each; all at once, cold, then from the pool."""
    documents = [prompt_of(seed, 4 * BLOCK) for seed in range(60, 70)]
    prompts = [documents[n % 10] + prompt_of(100 + n, 10 + n % 30) for n in range(200)]
    expected = computed("llama", prompts, 6)
    with running(llama, {"memory": ["64MiB"]}) as engine:
        assert engine.ask(prompts, 6) == expected
        engine.forget()
        before = engine.counts()
        assert engine.ask(prompts, 6) == expected
        assert (engine.counts() - before).external >= 10 * 3 * BLOCK
