"""TTFT of a long hit through the engine: from host memory and from a slab, against recomputation and `coupled`."""

from __future__ import annotations

import queue
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from penstock.core.config import Mode, SchedulerConfig
from penstock.core.cost import CostModel
from penstock.core.keys import KeyChain, root_key
from penstock.core.layout import staging_bytes
from penstock.core.new_block import NewBlock, prefix_position
from penstock.engine.api import GenerationRequest, RequestReport, TokenEvent
from penstock.engine.calibrate import calibrate
from penstock.engine.engine import Engine, new_request_id
from penstock.engine.hf_runner import HFRunner
from penstock.engine.runner import SamplingParams
from penstock.io.memory import aligned_buffer
from penstock.pool.api import Pool, PoolError
from penstock.pool.setup.open import open_local_pool
from penstock.report import Report

CLOSE_TIMEOUT_S = 30.0
COPY_WINDOW = 4  # blocks in flight from the memory pool to the slab
RECOMPUTE_SHARE = 0.7  # of the request timeout; what is expected to take longer is left out
POOL_SLACK = 1.1  # room of a pool over what is stored in it


@dataclass(frozen=True, slots=True)
class TtftSizes:
    """Prompts are a document's first `hit_tokens` and a question; documents are prefixes of one another."""

    hit_tokens: tuple[int, ...]
    question_tokens: int
    answer_tokens: int
    repeats: int
    max_batch_tokens: int
    staging_blocks: int
    upload_group_blocks: int
    request_timeout_s: float


@dataclass(slots=True)
class _Answer:
    tokens: list[int]
    report: RequestReport


@dataclass(slots=True)
class TtftBench:
    """One runner, engines on it one after the other: each starts with an empty L1, so that a hit is a load."""

    runner: HFRunner
    sizes: TtftSizes
    report: Report
    deadline_s: float  # monotonic; no measurement starts after it
    step: Callable[[str], None]
    cost: CostModel = field(init=False)
    document: list[int] = field(init=False)
    question: list[int] = field(init=False)

    def __post_init__(self) -> None:
        draw = random.Random(7)
        vocabulary = self.runner.vocab_size
        self.document = [draw.randrange(vocabulary) for _ in range(max(self.sizes.hit_tokens))]
        self.question = [draw.randrange(vocabulary) for _ in range(self.sizes.question_tokens)]
        self.cost = calibrate(self.runner, self.runner.kv.pages, self.sizes.max_batch_tokens)

    # -- one request ---------------------------------------------------------------------------------------------

    def _engine(self, pool: Pool | None, mode: Mode) -> Engine:
        sizes, layout = self.sizes, self.runner.layout
        config = SchedulerConfig(
            block_tokens=layout.block_tokens,
            block_bytes=layout.full_block_bytes,
            l1_pages=self.runner.kv.pages,
            l2_slots=sizes.staging_blocks,
            mode=mode,
            pool=pool is not None,
            layerwise=mode == "penstock",
            max_batch_tokens=sizes.max_batch_tokens,
            fetch_window_blocks=min(32, sizes.staging_blocks),
            upload_group_blocks=sizes.upload_group_blocks,
            save_queue_blocks=len(self.document) // layout.block_tokens + 1,
            request_timeout_s=sizes.request_timeout_s,
            default_slo_ttft_s=sizes.request_timeout_s,
        )
        return Engine(config, self.cost, self.runner, pool)

    def _ask(self, engine: Engine, prompt: list[int], answer_tokens: int) -> _Answer:
        events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        sampling = SamplingParams(max_tokens=answer_tokens, temperature=0.0, ignore_eos=True)
        request_id = new_request_id()
        engine.submit(GenerationRequest(request_id, prompt, sampling), events.put)
        end_s = time.monotonic() + self.sizes.request_timeout_s
        tokens: list[int] = []
        while True:
            try:
                event = events.get(timeout=max(0.0, end_s - time.monotonic()))
            except queue.Empty:
                engine.cancel(request_id)
                raise TimeoutError(f"no answer within {self.sizes.request_timeout_s:g} s") from None
            if event.token_id is not None:
                tokens.append(event.token_id)
            if event.finish_reason is not None:
                if event.error is not None or event.report is None or event.report.ttft_s is None:
                    raise RuntimeError(f"the engine ended a request with {event.finish_reason}: {event.error}")
                return _Answer(tokens, event.report)

    def _measure(self, pool: Pool | None, mode: Mode, hit_tokens: int) -> _Answer:
        prompt = self.document[:hit_tokens] + self.question
        engine = self._engine(pool, mode)
        try:
            return self._ask(engine, prompt, self.sizes.answer_tokens)
        finally:
            self._end(engine, pool)
            if pool is not None:  # the next measurement shall compute the question again
                pool.evict(self._chain(prompt).keys[hit_tokens // self.runner.layout.block_tokens :])

    def _chain(self, tokens: list[int]) -> KeyChain:
        layout = self.runner.layout
        chain = KeyChain(root_key(layout.fingerprint(self.runner.model_id), ""), layout.block_tokens)
        chain.extend(tokens)
        return chain

    def _end(self, engine: Engine, pool: Pool | None) -> None:
        engine.close(CLOSE_TIMEOUT_S)
        self.runner.kv.page_unlock_all(keep=pool.host_buffers() if pool is not None else ())

    # -- filling the pools ---------------------------------------------------------------------------------------

    def _pool_bytes(self) -> int:
        layout = self.runner.layout
        blocks = (len(self.document) + 2 * self.sizes.question_tokens) // layout.block_tokens + 8
        return int(blocks * staging_bytes(layout.full_block_bytes) * POOL_SLACK) + (1 << 20)

    def fill(self, pool: Pool) -> None:
        """Compute the longest document once; the engine saves it as it goes."""
        engine = self._engine(pool, "penstock")
        try:
            self._ask(engine, self.document, 1)
            if not engine.wait_idle(self.sizes.request_timeout_s):
                raise TimeoutError("the document's blocks were not saved in time")
        finally:
            self._end(engine, pool)

    def copy(self, source: Pool, target: Pool) -> bool:
        """Store the document's blocks of one pool in another, a few at a time; False when time ran out."""
        layout = self.runner.layout
        chain = self._chain(self.document)
        keys = chain.keys
        buffers = [aligned_buffer(staging_bytes(layout.full_block_bytes)) for _ in range(COPY_WINDOW)]
        timeout_s = self.sizes.request_timeout_s
        for first in range(0, len(keys), COPY_WINDOW):
            if self._late(f"the slab after {first} of {len(keys)} blocks"):
                return False
            indices = range(first, min(len(keys), first + COPY_WINDOW))

            def read(index: int, done: Callable[[PoolError | None], None]) -> None:
                source.read(keys[index], layout.full_block_bytes, buffers[index % COPY_WINDOW], timeout_s, done)

            def write(index: int, done: Callable[[PoolError | None], None]) -> None:
                size_bytes, position = layout.full_block_bytes, prefix_position(keys[0], index)
                block = NewBlock(keys[index], chain.parent_of(index), size_bytes, position)
                target.write(block, buffers[index % COPY_WINDOW], timeout_s, done)

            _all_done(read, indices, timeout_s)
            _all_done(write, indices, timeout_s)
        return True

    # -- the experiment ------------------------------------------------------------------------------------------

    def run(self, slab_folder: Path | None) -> None:
        """Every length without a pool, then from each kind of member in both modes."""
        expected = self._recompute()
        if not expected:
            return
        self.document = self.document[: max(expected)]
        memory = open_local_pool([self._pool_bytes()], [])
        try:
            self.fill(memory)
            self.step("fill the memory pool")
            self._compare(memory, "memory", expected)
            if slab_folder is None or self._late("the slab"):
                return
            self._run_slab(memory, slab_folder, expected)
        finally:
            self.runner.kv.page_unlock_all()
            memory.close(CLOSE_TIMEOUT_S)

    def _recompute(self) -> dict[int, list[int]]:
        """The answer for each length that can be computed in time; lengths go up."""
        expected: dict[int, list[int]] = {}
        self._measure(None, "penstock", min(self.sizes.hit_tokens))  # warms up kernels
        last_tokens, last_s = 0, 0.0
        for hit_tokens in sorted(self.sizes.hit_tokens):
            estimated_s = last_s * (hit_tokens / last_tokens) ** 2 if last_tokens else 0.0
            if estimated_s > RECOMPUTE_SHARE * self.sizes.request_timeout_s:
                self.report.notes.append(f"left out: {hit_tokens} tokens take about {estimated_s:.0f} s to recompute")
                break
            if self._late(f"recomputing {hit_tokens} tokens"):
                break
            answer = self._measure(None, "penstock", hit_tokens)
            expected[hit_tokens] = answer.tokens
            last_tokens, last_s = hit_tokens, answer.report.ttft_s or 0.0
            self.report.figure(f"ttft_{hit_tokens}_recompute_s", last_s)
            self.step(f"recompute {hit_tokens} tokens")
        return expected

    def _run_slab(self, memory: Pool, folder: Path, expected: dict[int, list[int]]) -> None:
        try:
            slab = open_local_pool([], [(folder / "gpu-bench.slab", self._pool_bytes())])
        except (OSError, ValueError) as error:
            self.report.notes.append(f"not measured: no slab in {folder}: {error}")
            return
        try:
            if self.copy(memory, slab):
                self.step("fill the slab")
                self._compare(slab, "slab", expected)
        finally:
            slab.close(CLOSE_TIMEOUT_S)

    def _compare(self, pool: Pool, kind: str, expected: dict[int, list[int]]) -> None:
        """Both modes by turns, so that a drift of the machine meets both."""
        unequal = 0
        modes: tuple[Mode, ...] = ("penstock", "coupled")
        for hit_tokens, tokens in expected.items():
            name = f"ttft_{hit_tokens}_{kind}"
            found: dict[Mode, list[_Answer]] = {mode: [] for mode in modes}
            for repeat, mode in [(repeat, mode) for repeat in range(self.sizes.repeats) for mode in modes]:
                if self._late(f"{name}_{mode}, repeat {repeat + 1}"):
                    break
                found[mode].append(self._measure(pool, mode, hit_tokens))
            for mode, answers in found.items():
                unequal += sum(answer.tokens != tokens for answer in answers)
                self._note_misses(name, mode, answers, hit_tokens)
                if answers:
                    times = [answer.report.ttft_s or 0.0 for answer in answers]
                    self.report.figure(f"{name}_{mode}_s", statistics.median(times))
            if not found["coupled"]:
                return
            figures = self.report.figures
            penstock_s = figures[f"{name}_penstock_s"]
            self.report.figure(f"{name}_gain", figures[f"{name}_coupled_s"] / penstock_s)
            self.report.figure(f"{name}_over_recompute", figures[f"ttft_{hit_tokens}_recompute_s"] / penstock_s)
            self.report.figure(f"{kind}_unequal_outputs", unequal, 0)
            self.step(f"{hit_tokens} tokens from {kind}")

    def _note_misses(self, name: str, mode: str, answers: Sequence[_Answer], hit_tokens: int) -> None:
        for answer in answers:
            if answer.report.cached_tokens != hit_tokens:
                self.report.notes.append(
                    f"{name}_{mode}: {answer.report.cached_tokens} of {hit_tokens} tokens were hits; "
                    f"failures: {answer.report.load_failures or 'none'}"
                )

    def _late(self, what: str) -> bool:
        if time.monotonic() < self.deadline_s:
            return False
        self.report.notes.append(f"left out for lack of time: {what} and what follows")
        return True


def _all_done(
    start: Callable[[int, Callable[[PoolError | None], None]], None], indices: Sequence[int], timeout_s: float
) -> None:
    """Start a pool operation per index and wait for all. Raises the first PoolError."""
    left = threading.Semaphore(0)
    errors: list[PoolError] = []

    def done(error: PoolError | None) -> None:
        if error is not None:
            errors.append(error)
        left.release()

    for index in indices:
        start(index, done)
    for _ in indices:
        if not left.acquire(timeout=timeout_s + 1.0):
            raise TimeoutError("a pool did not report the end of an operation")
    if errors:
        raise errors[0]
