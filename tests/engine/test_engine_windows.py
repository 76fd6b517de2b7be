"""The window of `penstock serve` is in bytes: small blocks travel in long spans, large ones stay within it. Counted,
over a pool node."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest

from penstock.core.config import SchedulerConfig
from penstock.core.keys import BlockKey
from penstock.core.spans import SPAN_BLOCKS_MAX
from penstock.core.windows import FETCH_WINDOW_BYTES
from penstock.engine.api import GenerationRequest
from penstock.engine.build import RunningEngine, build_engine
from penstock.engine.config import EngineConfig
from penstock.engine.runner import SamplingParams
from penstock.pool.api import Done, DoneMany, Pool, PoolError, ReadCheck
from penstock.pool.net.node import PoolNode
from penstock.pool.setup.open import open_local_pool
from penstock.pool.wrapped import WrappedPool
from tests.asking import WAIT_S, Answer, prompt_of

DIVISOR = 256


class CountedPool(WrappedPool):
    """Notes how many blocks each read has, and how many are open at once at most."""

    def __init__(self, inner: Pool) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self._open = 0
        self.most_open = 0
        self.reads: list[int] = []

    def _began(self, blocks: int) -> None:
        with self._lock:
            self.reads.append(blocks)
            self._open += blocks
            self.most_open = max(self.most_open, self._open)

    def _ended(self, blocks: int) -> None:
        with self._lock:
            self._open -= blocks

    def read(
        self,
        key: BlockKey,
        size_bytes: int,
        into: memoryview,
        timeout_s: float,
        done: Done,
        check: ReadCheck | None = None,
    ) -> None:
        def ended(error: PoolError | None) -> None:
            self._ended(1)
            done(error)

        self._began(1)
        self._inner.read(key, size_bytes, into, timeout_s, ended, check)

    def read_many(
        self,
        keys: Sequence[BlockKey],
        size_bytes: int,
        intos: Sequence[memoryview],
        timeout_s: float,
        done: DoneMany,
        checks: Sequence[ReadCheck | None] | None = None,
    ) -> None:
        def ended(errors: list[PoolError | None]) -> None:
            self._ended(len(keys))
            done(errors)

        self._began(len(keys))
        self._inner.read_many(keys, size_bytes, intos, timeout_s, ended, checks)


@pytest.fixture
def address() -> Iterator[str]:
    """A pool node with a memory member."""
    pool = open_local_pool((64 << 20,), [])
    node = PoolNode(pool, "127.0.0.1", 0)
    yield f"127.0.0.1:{node.address[1]}"
    node.close(5.0)
    pool.close(5.0)


def load(address: str, block_tokens: int, blocks: int) -> tuple[CountedPool, SchedulerConfig]:
    """Have an engine store a prompt of so many blocks, and another one load it."""
    config = EngineConfig(
        executor="modelled", bytes_divisor=DIVISOR, time_factor=0.01, block_tokens=block_tokens, pool=(address,),
        kv_memory_bytes=16 << 20, staging_bytes=16 << 20,
    )  # fmt: skip
    prompt = prompt_of(1, blocks * block_tokens + 1)
    for loaded in (0, blocks):
        made: list[tuple[CountedPool, SchedulerConfig]] = []

        def around(pool: Pool, settings: SchedulerConfig) -> Pool:
            made.append((CountedPool(pool), settings))  # noqa: B023 (it is called before the next round)
            return made[0][0]  # noqa: B023

        running = build_engine(config, around_pool=around)
        try:
            report = _ask(running, prompt)
            assert report.report.loaded_bytes == loaded * running.runner.layout.full_block_bytes
        finally:
            running.close()
    return made[0]


def _ask(running: RunningEngine, prompt: list[int]) -> Answer:
    answer = Answer()
    running.engine.submit(GenerationRequest("r", prompt, SamplingParams(max_tokens=1)), answer)
    assert answer.wait().finish_reason == "length"
    assert running.engine.wait_idle(WAIT_S)
    return answer


def test_a_load_of_small_blocks_is_a_few_long_spans(address: str) -> None:
    """Blocks of one token stand for 128 KiB."""
    blocks = 8 * SPAN_BLOCKS_MAX
    pool, config = load(address, 1, blocks)
    assert config.fetch_window_blocks == blocks
    assert sum(pool.reads) == blocks and max(pool.reads) == SPAN_BLOCKS_MAX
    assert len(pool.reads) < 12, "blocks travelled in short spans"


def test_open_reads_of_large_blocks_stay_within_the_window(address: str) -> None:
    """Blocks of 256 tokens stand for 32 MiB each: two fill the window."""
    pool, config = load(address, 256, 12)
    assert config.fetch_window_blocks == 2
    assert pool.reads == [1] * 12 and 1 <= pool.most_open <= 2
    assert pool.most_open * config.block_bytes * DIVISOR <= FETCH_WINDOW_BYTES
