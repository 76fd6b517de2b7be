"""Load or recompute, live: behind a slow link the front of a hit is computed, with the same tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable

from penstock.engine.hf_runner import HFRunner
from penstock.pool.api import Done, Pool, ReadCheck
from tests.asking import prompt_of
from tests.engine.engine_rig import BLOCK, WatchedPool, serving

READ_S = 0.2  # of up to eight blocks at once; computing a block takes a few ms


class SlowPool(WatchedPool):
    """Each read ends `READ_S` after it began."""

    def read(
        self,
        key: bytes,
        size_bytes: int,
        into: memoryview,
        timeout_s: float,
        done: Done,
        check: ReadCheck | None = None,
    ) -> None:
        timer = threading.Timer(READ_S, super().read, (key, size_bytes, into, timeout_s, done, check))
        self._timers.append(timer)
        timer.start()


def test_the_front_of_a_hit_behind_a_slow_link_is_computed(
    llama: HFRunner, memory_pool: Pool, computed: Callable[..., list[int]]
) -> None:
    prompts = [prompt_of(70 + number, 9 * BLOCK + 5) for number in range(2)]
    long = prompt_of(80, 40 * BLOCK + 5)
    with serving(llama, memory_pool, l1_pages=128) as filling:
        for prompt in (*prompts, long):
            assert filling.ask(prompt).tokens == computed(prompt)
        filling.settle()
    pool = SlowPool(memory_pool, leases=False)
    with serving(llama, pool, l1_pages=128, recompute=True) as rig:
        for prompt in prompts:  # their loads and batches are what costs are measured by
            assert rig.ask(prompt).tokens == computed(prompt)
        answer = rig.ask(long)
        assert answer.tokens == computed(long)
        instead = rig.counter("computed_instead_tokens")
        assert instead >= BLOCK
        assert answer.report.cached_tokens <= 40 * BLOCK - BLOCK
    pool.close(5.0)
