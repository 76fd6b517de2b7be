"""Runs of a prefix on many nodes: what one engine writes another one finds, in few rounds, and evenly spread."""

from __future__ import annotations

import hashlib
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.keys import BlockKey
from penstock.core.pool.placement import SlotMap, slot_of
from penstock.core.pool.runs import FIRST_PARTS, ROUNDS_MAX, RUN_BLOCKS, OpenRuns, RunSearch, begins_run
from penstock.core.pool.strays import EVERY_LOOKUPS, WATCH_LOOKUPS, WATCH_S, StrayWatch
from penstock.sim.commands.cost import bytecodes

ROOT = b"r" * 16
Nodes = dict[int, set[BlockKey]]


class Pool:
    """Nodes that hold keys, a writer, and a reader of another engine."""

    def __init__(self, nodes: int) -> None:
        self.map = SlotMap([(at, f"n{at}:1", 1e9) for at in range(nodes)])
        self.held: Nodes = {at: set() for at in range(nodes)}
        self.runs = OpenRuns()

    def owner(self, key: BlockKey) -> int:
        return self.map.owner(slot_of(key))

    def write(self, keys: list[BlockKey], first: int = 0) -> None:
        for key, parent in zip(keys[first:], [ROOT, *keys][first:], strict=False):
            node = self.runs.place(key, parent, self.owner, lambda node: True)
            assert node is not None
            self.held[node].add(key)

    def search(self, keys: list[BlockKey]) -> tuple[RunSearch[int], int, int]:
        """The search at its end, its rounds, and how many nodes were asked in all."""
        search: RunSearch[int] = RunSearch(keys, lambda key: [self.owner(key)])
        rounds = asked = 0
        seen = set[tuple[int, int]]()
        while asks := search.next_round():
            rounds, asked = rounds + 1, asked + len(asks)
            for node, ranges in asks.items():
                indexes = [at for one in ranges for at in one]
                assert not seen & {(node, at) for at in indexes}, "no node is asked twice for a block"
                seen.update((node, at) for at in indexes)
                search.note(ranges, [node + 1 if keys[at] in self.held[node] else None for at in indexes])
            search.advance()
        return search, rounds, asked


def chain(length: int, *name: object, after: list[BlockKey] | None = None) -> list[BlockKey]:
    keys = list(after or [])
    while len(keys) < length:
        keys.append(
            hashlib.blake2b(repr((name, len(keys))).encode(), key=keys[-1] if keys else ROOT, digest_size=16).digest()
        )
    return keys


def test_a_prefix_is_found_by_its_runs_alone() -> None:
    pool = Pool(64)
    keys = chain(2048, "a")
    pool.write(keys)
    search, rounds, asked = pool.search(keys)
    assert search.end == 2048 and None not in search.found
    assert rounds == 2 and asked <= 2 + sum(map(begins_run, keys))
    runs = 1 + sum(one != two for one, two in pairwise(search.found))
    assert 2048 / RUN_BLOCKS / 2 < runs < 2048 / RUN_BLOCKS * 2
    assert len(set(search.found)) >= 12, "a long prefix is read from many nodes"


def test_runs_that_were_seen_are_asked_for_at_once() -> None:
    keys = chain(2048, "a")
    begins = [0, *(at for at, key in enumerate(keys) if begins_run(key) and at)]
    for seen in (0, FIRST_PARTS + 3, len(begins)):
        known = {keys[at] for at in begins[:seen]}
        search: RunSearch[int] = RunSearch(keys, lambda key: [key[0]], known.__contains__)
        asked = sorted(one.start for some in search.next_round().values() for one in some)
        assert asked == begins[: max(seen, FIRST_PARTS)]
    gap = {keys[at] for at in begins if at != begins[FIRST_PARTS + 1]}
    search = RunSearch(keys, lambda key: [key[0]], gap.__contains__)
    assert sum(len(some) for some in search.next_round().values()) == FIRST_PARTS + 1, "up to the first that was not"


def test_a_search_costs_steps_for_its_runs_and_none_for_its_blocks() -> None:
    keys = chain(2048, "a")
    runs = 1 + sum(map(begins_run, keys))

    def search() -> None:
        made: RunSearch[int] = RunSearch(keys, lambda key: [key[0] % 8], lambda _: True)
        for some in made.next_round().values():
            made.note(some, [1] * sum(map(len, some)))
        made.advance()
        assert made.end == len(keys)

    assert bytecodes(search) < 400 * runs, "1,965 for each of 34 runs before, of 2,048 blocks"


def test_a_prompt_that_nobody_wrote_costs_few_messages() -> None:
    search, rounds, asked = Pool(64).search(chain(2048, "?"))
    assert search.end == 0 and rounds == 1 and asked <= FIRST_PARTS


def test_continuations_of_one_prompt_do_not_all_lie_on_one_node() -> None:
    pool = Pool(64)
    shared = chain(20, "system")
    pool.write(shared)
    for user in range(3000):
        keys = chain(24, user, after=shared)
        pool.write(keys, 20)
        if user % 100 == 0:
            search, rounds, _ = pool.search(keys)
            assert search.end == 24 and rounds <= 3
    counts = [len(keys) for keys in pool.held.values()]
    assert max(counts) / (sum(counts) / 64) < 1.5, "a node for all that begins in one run would have nearly everything"


@pytest.mark.parametrize("nodes", [64, 256])
def test_many_prefixes_are_spread_evenly(nodes: int) -> None:
    pool = Pool(nodes)
    for number in range(200 * nodes):
        pool.write([hashlib.blake2b(str(number).encode(), digest_size=16).digest()])
    counts = [len(keys) for keys in pool.held.values()]
    assert max(counts) / (sum(counts) / nodes) <= 1.25


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30))
def test_what_several_writers_left_is_found_up_to_the_first_hole(seed: int, nodes: int) -> None:
    """Turns of chats that branch anywhere, written by several engines, each of which goes on where its lookup ended;
    blocks that get lost; every lookup finds what is there up to the first block that nobody has."""
    generator = random.Random(seed)
    pool = Pool(nodes)
    writers = [OpenRuns(generator.choice([2, 1000])) for _ in range(3)]
    known: list[list[BlockKey]] = [[]]
    for turn in range(12):
        before = generator.choice(known)
        base = before[: generator.randrange(len(before) + 1)]
        keys = chain(len(base) + generator.randrange(1, 60), turn, after=base)
        search, rounds, _ = pool.search(keys)
        assert rounds <= ROUNDS_MAX
        pool.runs = generator.choice(writers)
        pool.write(keys, search.end)
        known.append(keys)
        search, rounds, _ = pool.search(keys)
        assert rounds == ROUNDS_MAX or search.end == len(keys)
        if generator.random() < 0.3:
            lost = generator.randrange(len(keys))
            for held in pool.held.values():
                held.discard(keys[lost])
            assert pool.search(keys)[0].end <= lost
            del known[-1]


def test_a_node_that_was_seen_with_a_block_is_asked_first_then_its_owner() -> None:
    keys = [key for key in chain(400, "a") if not begins_run(key)][:4]
    search: RunSearch[int] = RunSearch(keys, lambda key: [7, 3])
    assert search.next_round() == {7: [range(4)]}
    search.note([range(4)], [1, None, None, None])
    search.advance()
    assert search.end == 1 and search.next_round() == {3: [range(1, 4)]}
    search.note([range(1, 4)], [1, None, 1])
    search.advance()
    assert search.next_round() == {} and search.end == 2 and search.found == [1, 1, None, 1]


def test_a_run_ends_with_its_node_and_open_runs_are_bounded() -> None:
    keys = [key for key in chain(400, "a") if not begins_run(key)][:4]
    runs = OpenRuns(capacity=2)
    owner = {keys[0]: 1, keys[1]: 2, keys[2]: 3, keys[3]: 4}.get
    assert runs.place(keys[0], ROOT, owner, lambda node: True) == 1
    assert runs.place(keys[1], keys[0], owner, lambda node: True) == 1, "the run goes on"
    assert runs.place(keys[2], keys[0], owner, lambda node: True) == 3, "another continuation begins a run"
    assert runs.place(keys[3], keys[1], owner, lambda node: node != 1) == 4, "its node is down"
    for at in range(5):
        runs.place(bytes([at]) * 16, ROOT, lambda key: 0, lambda node: True)
    assert len(runs) == 2
    assert runs.place(keys[0], b"?" * 16, lambda key: None, lambda node: True) is None


def test_all_nodes_are_asked_by_some_lookups_after_a_change_former_owners_for_some_time_and_few_later() -> None:
    watch = StrayWatch(100.0)
    assert [watch.asks(100.0) for _ in range(WATCH_LOOKUPS)] == ["all"] * WATCH_LOOKUPS
    soon = [watch.asks(99.0 + WATCH_S) for _ in range(20 * EVERY_LOOKUPS)]
    assert (soon.count("all"), soon.count("former")) == (20, 20 * (EVERY_LOOKUPS - 1))
    later = [watch.asks(101.0 + WATCH_S) for _ in range(20 * EVERY_LOOKUPS)]
    assert (later.count("all"), later.count("none")) == (20, 20 * (EVERY_LOOKUPS - 1))
    watch.changed(5000.0)
    assert [watch.asks(5001.0 + WATCH_S) for _ in range(WATCH_LOOKUPS)] == ["all"] * WATCH_LOOKUPS, "however late"
