"""The long run of `penstock bench scale --rounds`: a table that is filled, hit and evicted many times over."""

from __future__ import annotations

import gc
import heapq
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import psutil

from penstock.core.keys import KEY_BYTES
from penstock.core.layout import STAGING_ALIGNMENT_BYTES
from penstock.core.new_block import NewBlock, prefix_position
from penstock.pool.local.local_pool import KEYS_AT_ONCE
from penstock.pool.local.table import Table
from penstock.pool.local.writes import WRITTEN_AT_ONCE
from penstock.process.startup_objects import freeze_startup_objects
from penstock.report import Report

OWN_BLOCKS = (64, 512, 2048)  # of prefixes: a third of the blocks in each
HOT_PREFIXES = 512  # at most; looked up again and again
NOTED_EVERY = 16  # prefixes; of these some are hot from now on, others are looked up once, much later
MEMBERS = 2
STOP_MS_MAX = 20.0
GROWTH_MAX = 0.01
COLLECTED_EVERY = 4096  # prefixes, between collections of all generations
PAGE = STAGING_ALIGNMENT_BYTES
ROOT = bytes(KEY_BYTES)


class _Noted:
    """Prefixes that are looked up: hot ones often, others once, after so many blocks were written that about half of
    them have left."""

    def __init__(self, blocks: int, generator: random.Random) -> None:
        self._blocks, self._random = blocks, generator
        self._hot: list[bytes] = []
        self._hot_max = max(8, min(HOT_PREFIXES, blocks // 4096))
        self._cold: list[tuple[float, bytes]] = []  # by when they are due
        self._written = self._prefixes = 0

    @property
    def held_bytes(self) -> int:
        """Memory of the keys."""
        return sum(map(len, self._hot)) + sum(len(keys) for _, keys in self._cold)

    def written(self, news: list[NewBlock]) -> None:
        """Count a prefix that was written."""
        self._written += len(news)
        self._prefixes += 1
        if len(self._hot) == self._hot_max and self._prefixes % NOTED_EVERY:
            return
        keys = b"".join(new.key for new in news)
        if len(self._hot) < self._hot_max:
            self._hot.append(keys)
        elif self._prefixes % (2 * NOTED_EVERY):
            self._hot[self._random.randrange(self._hot_max)] = keys
        else:
            heapq.heappush(self._cold, (self._written + self._blocks * self._random.uniform(0.5, 1.5), keys))

    def next(self) -> list[bytes]:
        """The keys of prefixes to look up now."""
        due = [self._random.choice(self._hot)]
        while self._cold and self._cold[0][0] <= self._written:
            due.append(heapq.heappop(self._cold)[1])
        return due


@dataclass(slots=True)
class Round:
    """What the table was after one round: as many blocks written as it holds."""

    resident_bytes: int
    rows: int
    leaves: int
    hits: int
    asked: int
    store_us_per_block: float


@dataclass(slots=True)
class Rounds:
    """All rounds. `longest_s` is the longest CPU time of each kind of work under the lock, `holes` how often a block
    was found behind one that was not: a block that left before its leaf."""

    blocks: int
    empty_bytes: int
    rounds: list[Round] = field(default_factory=list)
    longest_s: dict[str, float] = field(default_factory=dict)
    over_limit: int = 0
    holes: int = 0

    def spent(self, what: str, seconds: float) -> None:
        """Count one call."""
        self.longest_s[what] = max(self.longest_s.get(what, 0.0), seconds)
        self.over_limit += seconds > STOP_MS_MAX / 1e3


def measure_rounds(
    report: Report, blocks: int, rounds: int, step: Callable[[str], None], say: Callable[[str], None]
) -> None:
    """Add the figures of the rounds, each with its goal; `say` gets a line for each round."""
    found = run_rounds(blocks, rounds, step, say)
    first, settled, last = found.rounds[0], found.rounds[min(1, len(found.rounds) - 1)], found.rounds[-1]
    report.figure("rounds_blocks", found.blocks)
    report.figure("rounds", rounds)
    report.figure("rounds_bytes_per_block", (first.resident_bytes - found.empty_bytes) / found.blocks, 100.0)
    grown = last.resident_bytes - settled.resident_bytes
    report.figure("rounds_growth", grown / max(1, settled.resident_bytes - found.empty_bytes), GROWTH_MAX)
    report.figure("rounds_rows_growth", last.rows / settled.rows - 1, GROWTH_MAX)
    report.figure("rounds_longest_stop_ms", 1e3 * max(found.longest_s.values()), STOP_MS_MAX)
    for what, seconds in found.longest_s.items():
        report.figure(f"rounds_longest_{what}_ms", 1e3 * seconds)
    report.figure("rounds_stops_over_limit", found.over_limit, 0.0)
    report.figure("rounds_first_store_us_per_block", first.store_us_per_block)
    report.figure("rounds_last_store_us_per_block", last.store_us_per_block)
    report.figure("rounds_hit_share", sum(r.hits for r in found.rounds) / sum(r.asked for r in found.rounds))
    report.figure("rounds_holes", found.holes, 0.0)
    report.notes.append("rounds_*: stops in CPU time of the thread that holds the lock, each call by itself")


def run_rounds(
    blocks: int, rounds: int, step: Callable[[str], None] = lambda _: None, say: Callable[[str], None] = lambda _: None
) -> Rounds:
    """Fill a table of two members that hold `blocks` blocks, then write as many again `rounds` times over, with lookups
    between."""
    generator = random.Random(3)
    freeze_startup_objects()
    found = Rounds(blocks, _resident_bytes())
    table = Table([(0, blocks // MEMBERS * PAGE)] * MEMBERS, [1.0] * MEMBERS)
    noted = _Noted(blocks, generator)
    for number in range(rounds + 1):
        step(f"{blocks} blocks are written, round {number} of {rounds}")
        found.rounds.append(one := _round(table, blocks, generator, noted, found))
        held = (one.resident_bytes - found.empty_bytes) / blocks
        longest = ", ".join(f"{what} {1e3 * seconds:.1f}" for what, seconds in found.longest_s.items())
        say(
            f"round {number}: {held:.1f} bytes per block, {one.rows} rows, {one.store_us_per_block:.1f} us per block "
            f"written, {one.hits / one.asked:.1%} hits, holes {found.holes}; longest so far in ms: {longest}; "
            f"over {STOP_MS_MAX:g} ms: {found.over_limit}"
        )
    return found


def _round(table: Table, blocks: int, generator: random.Random, noted: _Noted, found: Rounds) -> Round:
    written = hits = asked = prefixes = 0
    spent_s = 0.0
    while written < blocks:
        news = _prefix(min(generator.choice(OWN_BLOCKS), blocks - written))
        spent_s += _store(table, news, found)
        written += len(news)
        prefixes += 1
        noted.written(news)
        for keys in noted.next():
            hits += _look_up(table, keys, found)
            asked += len(keys) // KEY_BYTES
        if prefixes % COLLECTED_EVERY == 0:
            _timed(found, "collection", gc.collect)
    _timed(found, "collection", gc.collect)
    resident = _resident_bytes() - noted.held_bytes
    return Round(resident, table.rows_used, table.leaves_queued, hits, asked, 1e6 * spent_s / written)


def _store(table: Table, news: list[NewBlock], found: Rounds) -> float:
    """CPU seconds."""
    begin_s = time.thread_time()
    for at in range(0, len(news), WRITTEN_AT_ONCE):
        from_s = time.thread_time()
        blocks, _ = table.reserve_many(news[at : at + WRITTEN_AT_ONCE])
        reserved_s = time.thread_time()
        table.commit_many([block for block in blocks if block is not None])
        found.spent("reserve", reserved_s - from_s)
        found.spent("commit", time.thread_time() - reserved_s)
    return time.thread_time() - begin_s


def _look_up(table: Table, keys: bytes, found: Rounds) -> int:
    hits, ended = 0, False
    for at in range(0, len(keys), KEYS_AT_ONCE * KEY_BYTES):
        begin_s = time.thread_time()
        sizes = table.lookup_many(keys[at : at + KEYS_AT_ONCE * KEY_BYTES]).sizes
        found.spent("lookup", time.thread_time() - begin_s)
        here = int(np.count_nonzero(sizes))
        found.holes += bool(here and (ended or not sizes[:here].all()))
        ended |= here < len(sizes)
        hits += here
    return hits


def _timed(found: Rounds, what: str, work: Callable[[], object]) -> None:
    begin_s = time.thread_time()
    work()
    found.spent(what, time.thread_time() - begin_s)


def _prefix(blocks: int) -> list[NewBlock]:
    content = os.urandom(KEY_BYTES * blocks)
    keys = [content[at : at + KEY_BYTES] for at in range(0, len(content), KEY_BYTES)]
    parents = [ROOT, *keys]
    return [NewBlock(key, parents[at], PAGE, prefix_position(keys[0], at), b"", 0.01) for at, key in enumerate(keys)]


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)
