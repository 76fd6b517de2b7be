"""KV events: what a reader believes after them is what the pool holds, whatever comes, goes and gets lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from penstock.core.keys import BlockKey
from penstock.core.new_block import NewBlock, prefix_position
from penstock.core.operations import BlockHit
from penstock.pool.announced import AnnouncedPool
from penstock.pool.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Event, KvEventLog, hash_of, medium_of
from penstock.pool.setup.open import open_local_pool
from tests.pool.helpers import ROOT, WAIT_S, Outcome, chain, key_of, read, staged

SIZE = 4096
BLOCKS = 8


class Reader:
    """What somebody knows who has had every event."""

    def __init__(self) -> None:
        self.known: dict[int, str | None] = {}
        self.cleared = 0

    def hear(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self.known.clear()
                self.cleared += 1
            elif isinstance(event, BlockStored):
                assert event.parent_block_hash is None or event.parent_block_hash in self.known, "EVT-1"
                assert event.locality == "LOCAL" and len(event.token_ids) == event.block_size
                self.known.update(dict.fromkeys(event.block_hashes, event.medium))
            else:
                for block_hash in event.block_hashes:
                    assert self.known.pop(block_hash) == event.medium, "EVT-2"

    def hear_all(self, log: KvEventLog) -> None:
        while log.changed.is_set():
            self.hear(log.take(3))


def named(name: object, length: int) -> list[NewBlock]:
    """The blocks of a prompt, with tokens."""
    pairs = chain(name, length)
    return [
        NewBlock(key, parent, SIZE, prefix_position(pairs[0][0], index), tokens=(index, 7))
        for index, (key, parent) in enumerate(pairs)
    ]


def hashes(blocks: list[NewBlock]) -> set[int]:
    return {hash_of(block.key) for block in blocks}


def test_events_have_the_form_of_vllm() -> None:
    log = KvEventLog()
    first, second = named("a", 2)
    log.stored(first, "CPU")
    log.stored(second, "STORAGE")
    log.gone(second.key)
    cleared, stored, child, removed = log.take(10)
    assert isinstance(cleared, AllBlocksCleared)
    assert stored == BlockStored([hash_of(first.key)], None, [0, 7], 2, None, "CPU", None, locality="LOCAL")
    assert isinstance(child, BlockStored) and child.parent_block_hash == hash_of(first.key)
    assert isinstance(removed, BlockRemoved)
    assert removed.block_hashes == [hash_of(second.key)] and removed.medium == "STORAGE"
    assert not log.changed.is_set() and log.take(10) == [] and 0 <= hash_of(first.key) < 1 << 64


def test_a_block_waits_for_its_parent() -> None:
    log, reader = KvEventLog(), Reader()
    blocks = named("a", 5)
    for block in reversed(blocks):
        log.stored(block, "CPU")
    reader.hear_all(log)
    assert reader.known.keys() == hashes(blocks)


def test_blocks_without_tokens_and_without_parents_are_not_announced() -> None:
    log, reader = KvEventLog(orphans_max=3), Reader()
    log.stored(NewBlock(key_of("a"), ROOT, SIZE), "CPU")
    for name in range(20):
        log.stored(named(name, 2)[1], "CPU")
    reader.hear_all(log)
    assert reader.known == {}
    log.stored(named(19, 2)[0], "CPU")
    reader.hear_all(log)
    assert reader.known.keys() == hashes(named(19, 2)), "the latest of those that wait"


def test_what_finds_no_room_is_counted_and_learnt_anew() -> None:
    log, reader = KvEventLog(notes_max=8), Reader()
    blocks = named("a", 30)
    log.stored(blocks[0], "CPU")
    reader.hear_all(log)
    for block in blocks[1:]:
        log.stored(block, "CPU")
    assert log.dropped == 9 * 3
    reader.hear_all(log)
    assert reader.cleared == 2 and reader.known == {}
    keys = [block.key for block in blocks[:6]]
    log.found(keys, [BlockHit(SIZE, ("memory:0",))] * 5 + [None], list(range(12)), 2)
    reader.hear_all(log)
    assert reader.known.keys() == hashes(blocks[:5])


def test_announced_blocks_are_bounded() -> None:
    log, reader = KvEventLog(announced_max=4), Reader()
    for name in range(10):
        log.stored(named(name, 1)[0], "CPU")
        reader.hear_all(log)
        assert len(reader.known) <= 4
    assert reader.known.keys() == hashes([named(name, 1)[0] for name in range(6, 10)])


def test_where_others_publish_too_blocks_are_removed_one_by_one() -> None:
    log, reader = KvEventLog(notes_max=2, clears=False), Reader()
    blocks = named("a", 2)
    log.stored(blocks[0], "CPU")
    log.stored(blocks[1], "CPU")
    reader.hear_all(log)
    assert reader.known.keys() == hashes(blocks)
    for name in range(3):
        log.stored(named(name, 1)[0], "CPU")
    reader.hear_all(log)
    assert reader.known == {} and reader.cleared == 0


@pytest.mark.parametrize(
    ("route", "medium"),
    [
        (("memory:0",), "CPU"),
        (("ssd:0",), "STORAGE"),
        (("memory:0@10.0.0.1:7070", "net@10.0.0.1:7070"), "STORAGE"),
    ],
)
def test_media(route: tuple[str, ...], medium: str) -> None:
    assert medium_of(route) == medium


@pytest.fixture
def pool() -> Iterator[AnnouncedPool]:
    pool = AnnouncedPool(open_local_pool([BLOCKS * SIZE], []), KvEventLog())
    yield pool
    pool.close(WAIT_S)


def write(pool: AnnouncedPool, block: NewBlock) -> None:
    outcome = Outcome()
    pool.write(block, staged(block.key, SIZE), WAIT_S, outcome)
    assert outcome.reason() == "ok"


def held(pool: AnnouncedPool, keys: list[BlockKey]) -> set[int]:
    return {hash_of(key) for key, hit in zip(keys, pool.lookup(keys, WAIT_S), strict=True) if hit is not None}


def test_a_reader_knows_what_a_pool_holds_that_evicts(pool: AnnouncedPool) -> None:
    reader, keys = Reader(), list[BlockKey]()
    for name in range(20):
        for block in named(name, 3):
            keys.append(block.key)
            write(pool, block)
            reader.hear_all(pool.events)
            assert reader.known.keys() == held(pool, keys)
    assert len(reader.known) == BLOCKS and set(reader.known.values()) == {"CPU"}
    there = next(key for key in keys if hash_of(key) in reader.known)
    assert read(pool, there) == "ok" and read(pool, key_of("never")) == "missing"
    assert pool.evict([there]) == 1
    reader.hear_all(pool.events)
    assert hash_of(there) not in reader.known and reader.known.keys() == held(pool, keys)
