"""How much of loading hides under compute, by the runner alone."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from penstock.core.operations import ChunkOutcome
from penstock.engine.hf_runner import HFRunner
from penstock.engine.runner import Chunk, SamplingParams, UploadGroup
from penstock.io.memory import aligned_buffer
from penstock.process.switch_interval import switch_often
from penstock.report import Report

GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
HIDDEN_SHARE_GOAL = 0.9
COMPUTE_OVER_LOAD_MIN = 1.5  # so that there is enough compute to hide the loading under
THREAD_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class UploadSizes:
    """How much is moved and computed, and how often."""

    hit_blocks: int
    query_tokens: tuple[int, ...]  # tried in turn until compute takes long enough
    repeats: int


class HostBlocks:
    """Page-locked host memory (on CUDA) cut into full blocks."""

    def __init__(self, runner: HFRunner, blocks: int) -> None:
        self.block_bytes = runner.layout.full_block_bytes
        self.memory = aligned_buffer(blocks * self.block_bytes)
        runner.page_lock(self.memory)
        self.blocks = [self.memory[at : at + self.block_bytes] for at in range(0, self.memory.nbytes, self.block_bytes)]


def timed(runner: HFRunner, work: Callable[[], object]) -> float:
    """Seconds from a quiet device to a quiet device."""
    accelerator = runner.kv.accelerator
    accelerator.synchronize()
    start_s = time.perf_counter()
    work()
    accelerator.synchronize()
    return time.perf_counter() - start_s


class _Hit:
    """A request whose first blocks come from the host, and whose last tokens are computed."""

    def __init__(self, runner: HFRunner, host: HostBlocks, hit_blocks: int, query_tokens: int) -> None:
        block_tokens = runner.layout.block_tokens
        self.runner = runner
        self.start = hit_blocks * block_tokens
        total = hit_blocks + -(-query_tokens // block_tokens)
        self.pages = random.Random(1).sample(range(runner.kv.pages), total)
        draw = random.Random(2)
        self.tokens = [draw.randrange(runner.vocab_size) for _ in range(self.start + query_tokens)]
        self.blocks = list(zip(host.blocks[:hit_blocks], self.pages[:hit_blocks], strict=True))

    def fill_host(self) -> None:
        """Compute the prefix once and take its KV to the host."""
        step = 64 * self.runner.layout.block_tokens
        for low in range(0, self.start, step):
            self.runner.run([Chunk("prefix", self.tokens[low : min(self.start, low + step)], low, self.pages)])
        for block, page in self.blocks:
            self.runner.download(page, block)

    def compute(self, pending: tuple[UploadGroup, ...] = ()) -> Sequence[ChunkOutcome]:
        chunk = Chunk("hit", self.tokens[self.start :], self.start, self.pages, GREEDY, pending=pending)
        return self.runner.run([chunk])

    def load(self) -> None:
        self.runner.upload(self.runner.start_upload(self.blocks))

    def load_under_compute(self) -> Sequence[ChunkOutcome]:
        """Both at once; compute follows the upload layer by layer."""
        group = self.runner.start_upload(self.blocks)
        uploader = threading.Thread(target=self.runner.upload, args=(group,), daemon=True)
        uploader.start()
        token = self.compute((group,))
        uploader.join(THREAD_TIMEOUT_S)
        if uploader.is_alive():
            raise TimeoutError(f"an upload of {len(self.blocks)} blocks took more than {THREAD_TIMEOUT_S:g} s")
        return token


def measure_hidden_share(runner: HFRunner, sizes: UploadSizes, report: Report) -> None:
    """(load alone + compute alone - both at once) / load alone, with enough compute to hide the load under."""
    switch_often()  # as in an engine
    host = HostBlocks(runner, sizes.hit_blocks)
    try:
        _measure_hidden_share(runner, host, sizes, report)
    finally:
        runner.page_unlock(host.memory)


def _measure_hidden_share(runner: HFRunner, host: HostBlocks, sizes: UploadSizes, report: Report) -> None:
    hit = _Hit(runner, host, sizes.hit_blocks, sizes.query_tokens[0])
    hit.fill_host()
    load_s = statistics.median(timed(runner, hit.load) for _ in range(sizes.repeats))
    for query_tokens in sizes.query_tokens:
        hit = _Hit(runner, host, sizes.hit_blocks, query_tokens)
        hit.load()
        hit.compute()
        expected = hit.compute()
        compute_s = statistics.median(timed(runner, hit.compute) for _ in range(sizes.repeats))
        if compute_s >= COMPUTE_OVER_LOAD_MIN * load_s:
            break
    both_s, unequal = [], 0
    for _ in range(sizes.repeats):
        for _, page in hit.blocks:
            runner.kv.data[page].zero_()  # nothing of the previous round helps
        tokens: list[list[int | None]] = []
        both_s.append(timed(runner, lambda tokens=tokens: tokens.append(hit.load_under_compute())))  # type: ignore[misc]
        unequal += tokens[0] != expected
    together_s = statistics.median(both_s)
    report.figure("hidden_share", min(1.0, (load_s + compute_s - together_s) / load_s), HIDDEN_SHARE_GOAL)
    report.figure("hidden_load_s", load_s)
    report.figure("hidden_compute_s", compute_s)
    report.figure("hidden_together_s", together_s)
    report.figure("hidden_hit_tokens", hit.start)
    report.figure("hidden_query_tokens", len(hit.tokens) - hit.start)
    report.figure("hidden_unequal_outputs", unequal, 0)
