"""The measurements of `penstock bench pool`: this machine's memory and disk at their own speed."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from penstock.bench.documents import Document, document
from penstock.bench.io_loads import FilePerChunk, Load, Sample, run_engine
from penstock.core.keys import KEY_BYTES, BlockKey
from penstock.core.new_block import NewBlock
from penstock.io import BlockEngine, IoOp, aligned_buffer, open_engine
from penstock.pool.api import Pool, PoolError
from penstock.pool.checksum import block_checksum
from penstock.pool.setup.open import open_local_pool
from penstock.report import Report

DEPTH = 32  # concurrent operations of an engine
CHUNK_BYTES = 2 << 20  # of part `cpu`
BLOCK_BYTES = 8 << 20  # of part `sum`: 64 tokens of Llama-3.1-8B
FILES = 128
READS_OPEN = 8  # per member, raw and pooled
CPU_GOAL, SUM_GOAL = 10.0, 0.95
WAIT_S = 60.0


# -- CPU per GB -------------------------------------------------------------------------------------------------------


def measure_cpu(
    report: Report, folder: Path, repeats: int, run_s: float, size_bytes: int, step: Callable[[str], None]
) -> float:
    """CPU seconds per GB of one file per chunk (cold) and of `uring` on the same disk, in turns; returns those of the
    files. Raises OSError if io_uring is not available."""
    samples: defaultdict[str, list[Sample]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        engine = _open_slab(place / "slab", size_bytes)
        stack.callback(engine.close, WAIT_S)
        memory = aligned_buffer(READS_OPEN * CHUNK_BYTES)
        engine.register(memory)
        files = FilePerChunk(place, CHUNK_BYTES, FILES)
        load = Load(place / "slab", size_bytes, CHUNK_BYTES, "sequential", READS_OPEN, run_s)
        for _ in range(repeats):
            step("CPU per GB: a file per chunk")
            samples["file_per_chunk"].append(files.run(memory))
            step("CPU per GB: uring")
            samples["uring"].append(run_engine(load, engine, memory))
    for who, runs in samples.items():
        report.figure(f"{who}_read_cpu_s_per_gb", statistics.median(one.cpu_s_per_gb for one in runs))
        report.figure(f"{who}_read_gb_per_s", statistics.median(one.gb_per_s for one in runs))
    cut = [a.cpu_s_per_gb / b.cpu_s_per_gb for a, b in zip(samples["file_per_chunk"], samples["uring"], strict=True)]
    report.figure("cpu_per_gb_file_over_uring", statistics.median(cut), CPU_GOAL)
    return report.figures["file_per_chunk_read_cpu_s_per_gb"]


def _open_slab(path: Path, size_bytes: int) -> BlockEngine:
    """A slab of random bytes behind the uring engine."""
    engine = open_engine(path, size_bytes, DEPTH)
    if engine.name != "uring":
        engine.close(WAIT_S)
        raise OSError("the uring engine cannot run here: " + "; ".join(engine.notes))
    memory = aligned_buffer(8 * CHUNK_BYTES)
    memory[:] = np.random.default_rng(0).bytes(len(memory))
    for at in range(0, size_bytes, len(memory)):
        engine.submit([IoOp("write", at, memory[: min(len(memory), size_bytes - at)], at)])
        for done in engine.poll(WAIT_S):
            if done.error is not None:
                raise done.error
    engine.sync()
    return engine


# -- memory and slab together -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Counter:
    """Bytes that one contestant moved during the measured time."""

    moved_bytes: int = 0


def measure_sum(
    report: Report, folder: Path, repeats: int, run_s: float, size_bytes: int, step: Callable[[str], None]
) -> None:
    """`sum_over_alone`: a memory and a slab member read together through one pool, relative to the sum of a bare copy
    loop and the bare engine alone; `sum_over_together`: relative to both of these running at once."""
    runs: defaultdict[str, list[float]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        raw = _Raw(place / "raw-slab", size_bytes)
        stack.callback(raw.close)
        room = size_bytes + (64 << 20)
        pool = open_local_pool([room], [(place / "slab", room)], weights=[1.0, 1.0])
        stack.callback(pool.close, WAIT_S)
        reader = _PoolReader(pool, size_bytes)
        contestants: dict[str, Callable[[], float]] = {
            "memory_alone": lambda: _timed([raw.copy], run_s),
            "slab_alone": lambda: _timed([raw.read], run_s),
            "together": lambda: _timed([raw.copy, raw.read], run_s),
            "together_verified": lambda: _timed([raw.copy, raw.read_and_verify], run_s),
            "pool": lambda: reader.run(run_s),
        }
        order = list(contestants)
        for _ in range(repeats):
            order.append(order.pop(0))
            for who in order:
                step(f"memory and slab: {who}")
                runs[who].append(contestants[who]())
    for who, values in runs.items():
        report.figure(f"{who}_read_gb_per_s", statistics.median(values))
    sums = [a + b for a, b in zip(runs["memory_alone"], runs["slab_alone"], strict=True)]
    over_sum = statistics.median(p / s for p, s in zip(runs["pool"], sums, strict=True))
    over_both = statistics.median(p / t for p, t in zip(runs["pool"], runs["together"], strict=True))
    report.figure("pool_over_sum_alone", over_sum, SUM_GOAL)
    report.figure("pool_over_both_at_once", over_both, SUM_GOAL)
    verified = statistics.median(p / t for p, t in zip(runs["pool"], runs["together_verified"], strict=True))
    report.figure("pool_over_both_at_once_verified", verified)
    both = statistics.median(t / s for t, s in zip(runs["together"], sums, strict=True))
    report.figure("both_at_once_over_sum_alone", both)
    report.notes.append(
        "sum: alone and at once are a bare copy loop and the bare uring engine, which verify nothing; the pool "
        "verifies every block of the slab, as `verified` does. Where both at once do not reach the sum, the processor "
        "is what binds"
    )


def _timed(loops: Sequence[Callable[[threading.Event, _Counter], None]], run_s: float) -> float:
    """GB/s of loops that run at once, each on its own thread, from when all run until the first is stopped."""
    stop = threading.Event()
    counters = [_Counter() for _ in loops]
    failed: list[BaseException] = []

    def guarded(loop: Callable[[threading.Event, _Counter], None], counter: _Counter) -> None:
        try:
            loop(stop, counter)
        except BaseException as error:  # noqa: BLE001 (the caller raises it again)
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=pair) for pair in zip(loops, counters, strict=True)]
    began_s = time.perf_counter()
    for thread in threads:
        thread.start()
    stop.wait(run_s)
    moved = sum(counter.moved_bytes for counter in counters)
    elapsed_s = time.perf_counter() - began_s
    stop.set()
    for thread in threads:
        thread.join(WAIT_S)
    if failed:
        raise failed[0]
    return moved / elapsed_s / 1e9


class _Raw:
    """The same loads without a pool: a copy loop over memory, and the engine on a slab."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._chunks = size_bytes // BLOCK_BYTES
        self._engine = _open_slab(path, size_bytes)
        self._source = aligned_buffer(size_bytes)
        self._source[:] = bytes(size_bytes)
        self._into = aligned_buffer(READS_OPEN * BLOCK_BYTES)
        self._memory = aligned_buffer(READS_OPEN * BLOCK_BYTES)
        self._engine.register(self._memory)

    def copy(self, stop: threading.Event, counter: _Counter) -> None:
        at = 0
        while not stop.is_set():
            slot, chunk = at % READS_OPEN, at % self._chunks
            into = self._into[slot * BLOCK_BYTES : (slot + 1) * BLOCK_BYTES]
            source = self._source[chunk * BLOCK_BYTES : (chunk + 1) * BLOCK_BYTES]
            np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(source, np.uint8))
            counter.moved_bytes += BLOCK_BYTES
            at += 1

    def read(self, stop: threading.Event, counter: _Counter) -> None:
        self._read(stop, counter, False)

    def read_and_verify(self, stop: threading.Event, counter: _Counter) -> None:
        self._read(stop, counter, True)

    def _read(self, stop: threading.Event, counter: _Counter, verify: bool) -> None:
        engine, at = self._engine, 0
        free = [self._memory[n * BLOCK_BYTES : (n + 1) * BLOCK_BYTES] for n in range(READS_OPEN)]
        while free or engine.in_flight():
            for view in free if not stop.is_set() else ():
                engine.submit([IoOp("read", at % self._chunks * BLOCK_BYTES, view, view)])
                at += 1
            free = []
            for done in engine.poll(WAIT_S):
                if done.error is not None:
                    raise done.error
                if verify:
                    block_checksum(bytes(KEY_BYTES), done.tag)
                counter.moved_bytes += BLOCK_BYTES
                if not stop.is_set():
                    free.append(done.tag)

    def close(self) -> None:
        self._engine.close(WAIT_S)


class _PoolReader:
    """Reads of all blocks of a pool, with `READS_OPEN` running at each member."""

    def __init__(self, pool: Pool, size_bytes: int) -> None:
        self._pool = pool
        self._memory = aligned_buffer(2 * READS_OPEN * BLOCK_BYTES)
        pool.register(self._memory)
        one = document(bytes(16), 2 * size_bytes // BLOCK_BYTES * 256, 1000, 3)
        self._fill(one)
        found = pool.lookup(one.keys, WAIT_S)
        self._keys: dict[str, list[BlockKey]] = {}
        for key, located in zip(one.keys, found, strict=True):
            if located is not None:
                self._keys.setdefault(located.route[0], []).append(key)

    def _fill(self, one: Document) -> None:
        free = threading.Semaphore(READS_OPEN)
        self._memory[:] = np.random.default_rng(0).bytes(len(self._memory))
        data = self._memory[:BLOCK_BYTES]
        for index, key in enumerate(one.keys):
            if not free.acquire(timeout=WAIT_S):
                raise TimeoutError(f"the pool took no block for {WAIT_S:g} s")
            block = NewBlock(key, one.chain.parent_of(index), BLOCK_BYTES, index)
            self._pool.write(block, data, WAIT_S, lambda error: free.release())
        for _ in range(READS_OPEN):
            if not free.acquire(timeout=WAIT_S):
                raise TimeoutError(f"the pool took no block for {WAIT_S:g} s")

    def run(self, run_s: float) -> float:
        """GB/s over `run_s`. Raises the first PoolError."""
        stop = threading.Event()
        ended = threading.Semaphore(0)
        lock = threading.Lock()
        counter = _Counter()
        errors: list[PoolError] = []
        views = [self._memory[n * BLOCK_BYTES : (n + 1) * BLOCK_BYTES] for n in range(2 * READS_OPEN)]

        def chain(keys: list[BlockKey], at: int, view: memoryview) -> None:
            def done(error: PoolError | None) -> None:
                if error is not None:
                    errors.append(error)
                else:
                    with lock:
                        counter.moved_bytes += BLOCK_BYTES
                if stop.is_set() or error is not None:
                    ended.release()
                else:
                    chain(keys, at + READS_OPEN, view)

            self._pool.read(keys[at % len(keys)], BLOCK_BYTES, view, WAIT_S, done)

        began_s = time.perf_counter()
        opened = 0
        for member, keys in enumerate(self._keys.values()):
            for n in range(READS_OPEN):
                chain(keys, n, views[member * READS_OPEN + n])
                opened += 1
        stop.wait(run_s)
        moved = counter.moved_bytes
        elapsed_s = time.perf_counter() - began_s
        stop.set()
        for _ in range(opened):
            if not ended.acquire(timeout=WAIT_S):
                raise TimeoutError(f"a read did not end within {WAIT_S:g} s")
        if errors:
            raise errors[0]
        return moved / elapsed_s / 1e9
