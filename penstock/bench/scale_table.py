"""The measurements of `penstock bench scale`: the table of one pool node, in memory and on disk."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from penstock.core.keys import KEY_BYTES
from penstock.core.layout import STAGING_ALIGNMENT_BYTES
from penstock.core.new_block import NewBlock, prefix_position
from penstock.pool.block import Block
from penstock.pool.local.local_pool import EVICTED_AT_ONCE, KEYS_AT_ONCE
from penstock.pool.local.table import Table
from penstock.pool.local.writes import WRITTEN_AT_ONCE
from penstock.pool.members.slab_index import RowTable
from penstock.process.startup_objects import freeze_startup_objects
from penstock.report import Report

PREFIX_BLOCKS = 2048
STORED_AT_ONCE = 256
PREFIXES_REMEMBERED = 64  # spread over the table, to be looked up
PAGE = STAGING_ALIGNMENT_BYTES
ROOT = bytes(KEY_BYTES)
BEFORE = {
    "bytes_per_block": 1400.0,
    "store_evicting_us_per_block": 121.0,
    "lookup_us_per_key": 13.0,
    "longest_stop_ms": 5000.0,
    "open_million_rows_s": 61.0,
}
GOALS = {
    "bytes_per_block": 100.0,
    "store_evicting_us_per_block": 15.0,
    "lookup_us_per_key": 0.5,
    "longest_stop_ms": 20.0,
    "longest_lock_ms": 1.0,
    "open_million_rows_s": 3.0,
}
Step = Callable[[str], None]


def figure(report: Report, name: str, value: float) -> None:
    """Record a figure with its goal, and what it was before."""
    report.figure(name, value, GOALS.get(name))
    if name in BEFORE:
        report.figure(f"{name}_before", BEFORE[name])


def measure_table(report: Report, blocks: int, step: Step) -> None:
    """Fill a table of two members, look blocks up, store more of them. `blocks` of one page each."""
    generator = random.Random(1)
    step(f"{blocks} blocks are stored")
    freeze_startup_objects()  # as a node does
    before_bytes = _resident_bytes()
    table = Table([(0, blocks // 2 * PAGE)] * 2, [1.0, 1.0])
    known, stops = [], _Stops()
    for number in range(blocks // PREFIX_BLOCKS + 1):
        news = _prefix(generator)
        _store(table, news, WRITTEN_AT_ONCE, stops)
        if number % max(1, blocks // PREFIX_BLOCKS // PREFIXES_REMEMBERED) == 0:
            known.append(b"".join(new.key for new in news))
    news.clear()
    gc.collect()
    grown_bytes = _resident_bytes() - before_bytes - sum(map(len, known))
    figure(report, "bytes_per_block", grown_bytes / len(table))
    figure(report, "bytes_per_row", float(table.bytes_per_row))
    step("blocks are looked up")
    known = [keys for keys in known if table.lookup_many(keys).sizes.all()]
    spent_s = []
    for _ in range(50):
        keys, begin_s = generator.choice(known), time.thread_time()
        table.lookup_many(keys)
        spent_s.append(time.thread_time() - begin_s)
    figure(report, "lookup_us_per_key", 1e6 * statistics.median(spent_s) / PREFIX_BLOCKS)
    step("blocks are stored where others leave")
    for name, at_once in (("", STORED_AT_ONCE), ("_spans", WRITTEN_AT_ONCE)):
        news = [new for _ in range(8) for new in _prefix(generator)]
        begin_s = time.thread_time()
        _store(table, news, at_once, stops)
        spent = time.thread_time() - begin_s
        figure(report, f"store_evicting{name}_us_per_block", 1e6 * spent / len(news))
    figure(report, "longest_lock_ms", 1e3 * _longest_lock(table, known, generator))
    stops.time(gc.collect)
    figure(report, "longest_stop_ms", 1e3 * stops.longest_s)


def measure_open(report: Report, blocks: int, folder: Path, step: Step) -> None:
    """Write a durable table, then open it as a node does at its start; scaled to a million rows."""
    step(f"a table file of {blocks} rows is written")
    generator, path = random.Random(2), folder / "scale.db"
    rows = RowTable(path)
    rows.start_empty(ROOT)
    written, parent = 0, ROOT
    small_s, small = 0.0, 0
    while written < blocks:
        many = WRITTEN_AT_ONCE if written < 64 * WRITTEN_AT_ONCE else 8192
        stored = []
        for number in range(written, min(blocks, written + many)):
            key = generator.randbytes(KEY_BYTES)
            stored.append((Block(key, parent, 0, number * PAGE, PAGE, number % 840, number, b"", 0.01), float(number)))
            parent = key
        begin_s = time.thread_time()
        rows.change([], stored, [])
        if many == WRITTEN_AT_ONCE:
            small_s, small = small_s + time.thread_time() - begin_s, small + len(stored)
        written += len(stored)
    rows.close()
    figure(report, "row_commit_us", 1e6 * small_s / max(1, small))
    figure(report, "bytes_per_row_on_disk", path.stat().st_size / blocks)
    step("it is opened")
    begin_s = time.thread_time()
    opened = RowTable(path)
    found, bad = opened.read()
    table = Table([(0, blocks * PAGE)], [1.0])
    refused = table.restore_many(0, found)
    spent_s = time.thread_time() - begin_s
    opened.close()
    if len(table) != blocks or bad or refused:
        raise ValueError(f"{len(table)} of {blocks} rows were read")
    figure(report, "open_million_rows_s", spent_s * 1e6 / blocks)


def _longest_lock(table: Table, known: list[bytes], generator: random.Random) -> float:
    """Seconds of the longest call that a pool makes under its lock; of each kind the median of some."""
    found = []
    for work in (
        lambda: table.lookup_many(generator.choice(known)[: KEYS_AT_ONCE * KEY_BYTES]),
        lambda: table.evict_many(generator.choice(known)[-EVICTED_AT_ONCE * KEY_BYTES :]),
    ):
        spent_s = []
        for _ in range(15):
            begin_s = time.thread_time()
            work()
            spent_s.append(time.thread_time() - begin_s)
        found.append(statistics.median(spent_s))
    times = []
    for _ in range(15):
        news, begin_s = _prefix(generator)[:WRITTEN_AT_ONCE], time.thread_time()
        blocks, _ = table.reserve_many(news)
        reserved_s = time.thread_time()
        table.commit_many([block for block in blocks if block is not None])
        times.append((reserved_s - begin_s, time.thread_time() - reserved_s))
    return float(max(*found, *map(statistics.median, zip(*times, strict=True))))


class _Stops:
    """The longest of some calls, in CPU time of this thread: what others do on the machine does not count."""

    def __init__(self) -> None:
        self.longest_s = 0.0

    def time(self, work: Callable[[], object]) -> None:
        """Do the work, and note how long it took."""
        begin_s = time.thread_time()
        work()
        self.longest_s = max(self.longest_s, time.thread_time() - begin_s)


def _store(table: Table, news: list[NewBlock], at_once: int, stops: _Stops) -> None:
    for at in range(0, len(news), at_once):
        some = news[at : at + at_once]

        def store(some: list[NewBlock] = some) -> None:
            blocks, _ = table.reserve_many(some)
            table.commit_many([block for block in blocks if block is not None])

        stops.time(store) if at_once == WRITTEN_AT_ONCE else store()


def _prefix(generator: random.Random) -> list[NewBlock]:
    keys = [generator.randbytes(KEY_BYTES) for _ in range(PREFIX_BLOCKS)]
    parents = [ROOT, *keys]
    return [NewBlock(key, parents[at], PAGE, prefix_position(keys[0], at), b"", 0.01) for at, key in enumerate(keys)]


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)
