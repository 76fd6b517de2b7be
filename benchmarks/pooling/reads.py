"""Part `reads` of `benchmarks pool`: reads a whole context from the pool, relative to the sum of device bandwidths."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.pooling.rig import (
    BYTES_DIVISOR,
    CONTEXTS,
    MEMORY_BYTES_PER_S,
    MODELS,
    SSD_BYTES_PER_S,
    Model,
    Rig,
    document_root,
    fill,
    open_rig,
    pooled,
)
from penstock.bench.documents import document
from penstock.core.keys import BlockKey
from penstock.core.layout import staging_bytes
from penstock.io.memory import aligned_buffer
from penstock.pool.api import PoolError
from penstock.report import Report

SLOWER = 12.0  # slower than for TTFTs: a context then takes half a second or more to read
RATIOS = (0.5, 1.0, 2.0, 4.0)  # bandwidth of a memory module over that of an SSD; the default is 12 / 14
SHORT_TOKENS, SHORT_REPEATS = 1 << 15, 3  # contexts up to this length are read this many times more often
READ_GOAL = 1.05
READ_TIMEOUT_S = 120.0


def read_all(rig: Rig, keys: Sequence[BlockKey], block_bytes: int, memory: memoryview) -> float:
    """Seconds from the lookup of all keys to the last byte in `memory`. Raises the first PoolError."""
    padded = staging_bytes(block_bytes)
    left = threading.Semaphore(0)
    errors: list[PoolError] = []

    def done(error: PoolError | None) -> None:
        if error is not None:
            errors.append(error)
        left.release()

    began_s = time.monotonic()
    found = rig.pool.lookup(keys, 10.0)
    if None in found:
        raise PoolError("missing", f"{found.count(None)} of {len(keys)} blocks are not in the pool")
    for number, key in enumerate(keys):
        rig.pool.read(key, block_bytes, memory[number * padded : (number + 1) * padded], READ_TIMEOUT_S, done)
    for _ in keys:
        if not left.acquire(timeout=READ_TIMEOUT_S):
            raise TimeoutError(f"a read of {len(keys)} blocks did not end within {READ_TIMEOUT_S:g} s")
    if errors:
        raise errors[0]
    return time.monotonic() - began_s


def measure_reads(
    report: Report,
    folder: Path,
    models: Sequence[str],
    contexts: Sequence[str],
    repeats: int,
    sweep: bool,
    step: Callable[[str], None],
) -> None:
    """`<model>_<context>_read_over_bound` of every model and context; the repeats of all contexts of a model take
    turns. With `sweep` also the longest context of the first model at other ratios of memory to SSD."""
    for name in models:
        ratios = _measure(folder, MODELS[name], contexts, repeats, MEMORY_BYTES_PER_S / SSD_BYTES_PER_S, step)
        for context, values in ratios.items():
            report.figure(f"{name}_{context}_read_over_bound", statistics.median(values), READ_GOAL)
            report.figure(f"{name}_{context}_read_over_bound_max", max(values))
    if sweep:
        name, context = models[0], contexts[-1]
        for ratio in RATIOS:
            values = _measure(folder, MODELS[name], [context], repeats, ratio, step)[context]
            report.figure(
                f"{name}_{context}_memory_over_ssd_{ratio:g}_read_over_bound", statistics.median(values), READ_GOAL
            )
    factors = ", ".join(f"{name} {SLOWER * MODELS[name].time_factor:g}" for name in models)
    report.modelled.append(
        f"reads: bytes and bandwidths are 1/{BYTES_DIVISOR}, times are multiplied ({factors}): each device is paced to "
        "its bandwidth at this scale; the bound is bytes / sum of bandwidths"
    )


def _measure(
    folder: Path, model: Model, contexts: Sequence[str], repeats: int, ratio: float, step: Callable[[str], None]
) -> dict[str, list[float]]:
    time_factor = SLOWER * model.time_factor
    profile = model.scaled(time_factor)
    root = document_root(profile)
    documents = {name: document(root, CONTEXTS[name], profile.vocab_size, at) for at, name in enumerate(contexts)}
    blocks = sum(len(one.keys) for one in documents.values())
    most = max(len(one.keys) for one in documents.values())
    memory = aligned_buffer(staging_bytes(model.block_bytes) * most)
    arrangement = pooled(memory=ratio * SSD_BYTES_PER_S)
    bound_s_per_byte = BYTES_DIVISOR * time_factor / arrangement.bytes_per_s
    found: dict[str, list[float]] = {name: [] for name in contexts}
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        rig = stack.enter_context(open_rig(arrangement, place, model.block_bytes, blocks, time_factor))
        rig.pool.register(memory)
        step(f"{model.name}: filling")
        fill(rig, list(documents.values()), model.block_bytes)
        for repeat in range(repeats * SHORT_REPEATS):
            for name, one in documents.items():
                if repeat >= repeats and CONTEXTS[name] > SHORT_TOKENS:
                    continue
                step(f"{model.name} {name}, memory over ssd {ratio:g}: reading")
                bound_s = len(one.keys) * model.block_bytes * bound_s_per_byte
                found[name].append(read_all(rig, one.keys, model.block_bytes, memory) / bound_s)
    return found
